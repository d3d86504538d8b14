//! One end of a proxied connection: a stream, and what was read of it and not used yet.

use std::{fmt, io, time::Duration};

use bytes::{Buf as _, BytesMut};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};

use crate::{
    stream::Stream,
    wire::{
        Malformed,
        header::{HEADER, Header},
    },
};

/// A stream and its buffer, which is small while nothing is under way.
#[derive(Debug)]
pub(crate) struct Peer {
    stream: Stream,
    buffer: BytesMut,
}

/// What a connection keeps while it is idle, for each of its ends.
pub(crate) const SMALL: usize = 4 << 10;
/// What is read at once of a message that is passed on.
pub(crate) const LARGE: usize = 64 << 10;

/// Why nothing more comes.
#[derive(Debug)]
pub(crate) enum Gone {
    /// It has closed its end, between two messages.
    Closed,
    /// It has closed its end in the middle of one, or the connection failed.
    Broken(io::Error),
    /// It took too long.
    Stalled,
}

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("closed"),
            Self::Broken(error) => error.fmt(f),
            Self::Stalled => f.write_str("it took too long"),
        }
    }
}

impl From<io::Error> for Gone {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

/// Sets what every connection has, before anything is said on it.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // Balancers and firewalls on the way forget who is silent for long; a peer that has vanished is noticed.
    let keepalive = socket2::TcpKeepalive::new().with_time(KEEP_ALIVE).with_interval(KEEP_ALIVE / 6);
    socket2::SockRef::from(stream).set_tcp_keepalive(&keepalive)
}

impl Peer {
    pub(crate) fn new(stream: Stream) -> Self {
        Self { stream, buffer: BytesMut::with_capacity(SMALL) }
    }

    /// What was read and not used yet.
    pub(crate) fn buffered(&self) -> &[u8] {
        &self.buffer
    }

    /// Has used so many bytes of it.
    pub(crate) fn used(&mut self, bytes: usize) {
        self.buffer.advance(bytes.min(self.buffer.len()));
    }

    /// Takes so many bytes out of it, which are there.
    pub(crate) fn take(&mut self, bytes: usize) -> BytesMut {
        self.buffer.split_to(bytes.min(self.buffer.len()))
    }

    /// Reads what comes, at least a byte. With `room` for that many at once.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(crate) async fn fill(&mut self, room: usize) -> Result<(), Gone> {
        if self.buffer.capacity() - self.buffer.len() < SMALL / 4 {
            self.buffer.reserve(room);
        }
        if self.stream.read_buf(&mut self.buffer).await? > 0 {
            return Ok(());
        }
        Err(if self.buffer.is_empty() { Gone::Closed } else { Gone::Broken(io::ErrorKind::UnexpectedEof.into()) })
    }

    /// As [`fill`](Self::fill), until then.
    pub(crate) async fn fill_until(&mut self, room: usize, until: Instant) -> Result<(), Gone> {
        timeout_at(until, self.fill(room)).await.unwrap_or(Err(Gone::Stalled))
    }

    /// The header of the next message, if it is there. It stays in the buffer.
    pub(crate) fn header(&self) -> Option<Result<Header, Malformed>> {
        self.buffer.first_chunk::<HEADER>().map(Header::read)
    }

    /// Writes all of it; each piece within a time.
    pub(crate) async fn send(&mut self, bytes: &[u8], within: Duration) -> Result<(), Gone> {
        for piece in bytes.chunks(LARGE) {
            timeout(within, self.stream.write_all(piece)).await.map_err(|_| Gone::Stalled)??;
        }
        // What TLS has encrypted may still be here.
        timeout(within, self.stream.flush()).await.map_err(|_| Gone::Stalled)??;
        Ok(())
    }

    /// After a message: whoever had a large one does not keep the memory for it.
    pub(crate) fn rest(&mut self) {
        if self.buffer.capacity() > LARGE + SMALL && self.buffer.len() < SMALL {
            let mut small = BytesMut::with_capacity(SMALL);
            small.extend_from_slice(&self.buffer);
            self.buffer = small;
        }
    }
}

const KEEP_ALIVE: Duration = Duration::from_secs(60);

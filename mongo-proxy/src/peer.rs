//! One end of a proxied connection: a stream, and what was read of it and not used yet.

use std::{fmt, io, time::Duration};

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
    buffer: Vec<u8>,
    /// So much of the buffer is used.
    used: usize,
    /// Whether nothing more comes.
    has_ended: bool,
    /// Whether it was told that nothing more comes from here.
    is_told_the_end: bool,
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
        Self { stream, buffer: Vec::with_capacity(SMALL), used: 0, has_ended: false, is_told_the_end: false }
    }

    /// What was read and not used yet.
    pub(crate) fn buffered(&self) -> &[u8] {
        &self.buffer[self.used..]
    }

    /// Has used so many bytes of it.
    pub(crate) fn used(&mut self, bytes: usize) {
        self.used = (self.used + bytes).min(self.buffer.len());
        if self.used == self.buffer.len() {
            self.buffer.clear();
            self.used = 0;
        }
    }

    /// Takes so many bytes out of it, which are there. A message that is all that was read is not copied.
    pub(crate) fn take(&mut self, bytes: usize) -> Vec<u8> {
        let bytes = bytes.min(self.buffered().len());
        let rest = self.buffer.split_off(self.used + bytes);
        let mut taken = std::mem::replace(&mut self.buffer, rest);
        taken.drain(..self.used);
        self.used = 0;
        taken
    }

    /// Reads what comes, at least a byte. With `room` for that many at once.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(crate) async fn fill(&mut self, room: usize) -> Result<(), Gone> {
        if self.used > 0 {
            self.buffer.drain(..self.used);
            self.used = 0;
        }
        if self.buffer.capacity() - self.buffer.len() < SMALL / 4 {
            self.buffer.reserve_exact(room.max(self.buffer.len() / 2));
        }
        match self.stream.read_buf(&mut self.buffer).await {
            Ok(bytes) if bytes > 0 => return Ok(()),
            // Not everybody who speaks TLS says goodbye.
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error.into()),
            _ => self.has_ended = true,
        }
        if self.buffer.is_empty() { Err(Gone::Closed) } else { Err(Gone::Broken(io::ErrorKind::UnexpectedEof.into())) }
    }

    /// Whether a whole message is there.
    pub(crate) fn has_message(&self) -> bool {
        matches!(self.header(), Some(Ok(header)) if header.length <= self.buffered().len())
    }

    /// Whether it has said that nothing more comes. It may still read, as who has closed only one half of a connection; and nobody knows whether it does.
    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Tells it that nothing more comes from here, while what comes from there is still read.
    pub(crate) fn tell_the_end(&mut self) -> io::Result<()> {
        self.is_told_the_end = true;
        self.stream.close_half()
    }

    pub(crate) fn is_told_the_end(&self) -> bool {
        self.is_told_the_end
    }

    /// As [`fill`](Self::fill), until then.
    pub(crate) async fn fill_until(&mut self, room: usize, until: Instant) -> Result<(), Gone> {
        timeout_at(until, self.fill(room)).await.unwrap_or(Err(Gone::Stalled))
    }

    /// The header of the next message, if it is there. It stays in the buffer.
    pub(crate) fn header(&self) -> Option<Result<Header, Malformed>> {
        self.buffered().first_chunk::<HEADER>().map(Header::read)
    }

    /// Writes all of it; each piece within a time.
    pub(crate) async fn send(&mut self, bytes: &[u8], within: Duration) -> Result<(), Gone> {
        if bytes.is_empty() {
            return Ok(());
        }
        // Most of what is sent is short, and is taken at once: that needs no time limit.
        let bytes = &bytes[self.stream.write_now(bytes)?..];
        if bytes.is_empty() {
            return Ok(());
        }
        for piece in bytes.chunks(LARGE) {
            timeout(within, self.stream.write_all(piece)).await.map_err(|_| Gone::Stalled)??;
        }
        // What TLS has encrypted may still be here.
        timeout(within, self.stream.flush()).await.map_err(|_| Gone::Stalled)??;
        Ok(())
    }

    /// Says that nothing more comes. Who was sent something last and is still sending has a moment to read it: a connection that is closed with something unread is reset, and what was on its way is lost.
    pub(crate) async fn close(mut self, was_told: bool) {
        let close = async {
            if self.stream.shutdown().await.is_err() || !was_told {
                return;
            }
            let mut left = DISCARDED;
            while left > 0 {
                self.buffer.clear();
                match self.stream.read_buf(&mut self.buffer).await {
                    Ok(bytes) if bytes > 0 => left = left.saturating_sub(bytes),
                    _ => return,
                }
            }
        };
        // Whoever does not take even that is gone.
        let _gone = timeout(CLOSE_WITHIN, close).await;
    }

    /// After a message: whoever had a large one does not keep the memory for it.
    pub(crate) fn rest(&mut self) {
        if self.buffer.capacity() > SMALL {
            let mut small = Vec::with_capacity(SMALL.max(self.buffered().len()));
            small.extend_from_slice(self.buffered());
            (self.buffer, self.used) = (small, 0);
        }
    }
}

const CLOSE_WITHIN: Duration = Duration::from_secs(1);
/// Of who is sent away, so much is read and thrown away.
const DISCARDED: usize = 1 << 20;
const KEEP_ALIVE: Duration = Duration::from_secs(60);

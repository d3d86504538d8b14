//! OP_COMPRESSED: a message within a message.

use std::io::Read as _;

use super::{
    Malformed,
    header::{HEADER, Header, LONGEST, Opcode},
};

/// How a message is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compressor {
    /// Not at all.
    Noop,
    Snappy,
    Zlib,
    Zstd,
}

impl Compressor {
    pub(crate) const ALL: [Self; 4] = [Self::Noop, Self::Snappy, Self::Zlib, Self::Zstd];

    pub(crate) fn id(self) -> u8 {
        match self {
            Self::Noop => 0,
            Self::Snappy => 1,
            Self::Zlib => 2,
            Self::Zstd => 3,
        }
    }
}

/// What comes before the compressed bytes, behind the header.
pub(crate) const PREFIX: usize = 9;

/// The length that a compressed message says that it has inflated, of which `body` is what comes after its header.
pub(crate) fn says(body: &[u8]) -> Result<usize, Malformed> {
    let length = body.get(4..).and_then(|rest| rest.first_chunk()).ok_or(Malformed::Bounds)?;
    let length = usize::try_from(i32::from_le_bytes(*length)).ok();
    length.filter(|length| *length <= LONGEST - HEADER).ok_or(Malformed::Compression)
}

/// Gives the message that is in a compressed one, of which `body` is what comes after its header: with a header of its own, as if it had come like that.
///
/// It inflates to exactly the length that it says, or it is none: a server that believes the length instead shows what was in its memory before (CVE-2025-14847).
pub(crate) fn inflate(header: Header, body: &[u8]) -> Result<(Header, Vec<u8>), Malformed> {
    let (prefix, compressed) = body.split_at_checked(PREFIX).ok_or(Malformed::Bounds)?;
    // Nothing is compressed twice, and no legacy message is compressed.
    if prefix[..4] != Opcode::Message.number().to_le_bytes() {
        return Err(Malformed::Compression);
    }
    let length = says(body)?;
    let compressor = Compressor::ALL.into_iter().find(|compressor| compressor.id() == prefix[8]).ok_or(Malformed::Compression)?;
    let inner = Header { length: HEADER + length, opcode: Opcode::Message, ..header };
    let mut message = Vec::with_capacity(HEADER + length + 1);
    inner.write(&mut message);
    match compressor {
        Compressor::Noop => message.extend_from_slice(compressed),
        Compressor::Snappy => {
            // It says its length at its beginning; only what it says twice alike is given memory.
            if snap::raw::decompress_len(compressed).ok() != Some(length) {
                return Err(Malformed::Compression);
            }
            message.resize(HEADER + length, 0);
            let inflated = snap::raw::Decoder::new().decompress(compressed, &mut message[HEADER..]);
            if inflated.ok() != Some(length) {
                return Err(Malformed::Compression);
            }
        }
        Compressor::Zlib => read_exactly(flate2::read::ZlibDecoder::new(compressed), length, &mut message)?,
        Compressor::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(compressed).map_err(|_| Malformed::Compression)?;
            // No more than the largest message needs to be looked back upon.
            decoder.window_log_max(26).map_err(|_| Malformed::Compression)?;
            read_exactly(decoder, length, &mut message)?;
        }
    }
    if message.len() != inner.length { Err(Malformed::Compression) } else { Ok((inner, message)) }
}

/// Inflates no more than a byte beyond what is said, and as much memory as it really needs.
pub(super) fn read_exactly(inflating: impl std::io::Read, length: usize, to: &mut Vec<u8>) -> Result<(), Malformed> {
    let most = u64::try_from(length).unwrap_or(u64::MAX).saturating_add(1);
    inflating.take(most).read_to_end(to).map(drop).map_err(|_| Malformed::Compression)
}

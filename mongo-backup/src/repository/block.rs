//! Blocks: some segments compressed together.
//!
//! A segment is as small as sharing wants it, and too small to compress well; a block holds about a mebibyte of segments
//! and is what zstd works on. Which segments share a block says nothing about them: they happened to be stored one after the other.

use bytes::Bytes;
use mongo_core::{Error, ErrorKind, Result};
use zstd::zstd_safe::CParameter;

use super::{
    cipher::Cipher,
    segment::{Content, SegmentId},
};

/// How a block is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As it is: compression would not have made it smaller.
    Plain,
    /// One zstd frame.
    Zstd,
}

impl Encoding {
    pub(crate) fn to_byte(self) -> u8 {
        match self {
            Self::Plain => 0,
            Self::Zstd => 1,
        }
    }

    pub(crate) fn from_byte(byte: u8) -> Result<Self> {
        match byte {
            0 => Ok(Self::Plain),
            1 => Ok(Self::Zstd),
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                "a block is stored in a way that is not known here: use a newer version of mongo-backup",
            )
            .with_context("encoding", byte)),
        }
    }
}

/// Where a block lies in its pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) encoding: Encoding,
    pub(crate) offset: u32,
    pub(crate) stored: u32,
    pub(crate) plain: u32,
}

impl Block {
    /// The place behind its last byte.
    pub(crate) fn end(&self) -> u64 {
        u64::from(self.offset) + u64::from(self.stored)
    }
}

/// A block that is being filled.
#[derive(Debug, Default)]
pub(crate) struct OpenBlock {
    pub(crate) plain: Vec<u8>,
    /// Each segment and its length; they stand back to back.
    pub(crate) segments: Vec<(SegmentId, u32)>,
}

impl OpenBlock {
    pub(crate) fn push(&mut self, id: SegmentId, plain: &[u8]) -> Result<()> {
        let length = u32::try_from(plain.len()).map_err(|_| Error::internal("a segment is too large"))?;
        self.plain.extend_from_slice(plain);
        self.segments.push((id, length));
        Ok(())
    }

    pub(crate) fn append(&mut self, other: &Self) {
        self.plain.extend_from_slice(&other.plain);
        self.segments.extend_from_slice(&other.segments);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    pub(crate) fn is_full(&self, content: Content) -> bool {
        let limit = match content {
            Content::Documents => BLOCK_BYTES,
            // Nodes are read one by one, and hardly compress.
            Content::Node => NODE_BLOCK_BYTES,
        };
        self.plain.len() >= limit
    }

    pub(crate) fn clear(&mut self) {
        self.plain.clear();
        self.segments.clear();
    }
}

/// A zstd context and its buffer, kept for the life of a worker: making one costs more than compressing a small block.
#[derive(Default)]
pub(crate) struct Compressor {
    context: Option<(i32, zstd::bulk::Compressor<'static>)>,
    buffer: Vec<u8>,
    sealed: Vec<u8>,
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Compressor")
    }
}

impl Compressor {
    /// A block as it is to be stored: compressed, if that makes it smaller, then sealed, if there is a cipher.
    pub(crate) fn compress<'a>(
        &'a mut self,
        plain: &'a [u8],
        level: i32,
        cipher: Option<&Cipher>,
    ) -> Result<(Encoding, &'a [u8])> {
        let context = match &mut self.context {
            Some((current, context)) if *current == level => context,
            slot => &mut slot.insert((level, context(level)?)).1,
        };
        let bound = zstd::zstd_safe::compress_bound(plain.len());
        if self.buffer.len() < bound {
            // Only ever longer: a buffer that follows each block's size is cleared anew for each.
            self.buffer.resize(bound, 0);
        }
        let length = context.compress_to_buffer(plain, &mut self.buffer[..]).map_err(failed)?;
        let (encoding, stored) =
            if length < plain.len() { (Encoding::Zstd, &self.buffer[..length]) } else { (Encoding::Plain, plain) };
        let Some(cipher) = cipher else { return Ok((encoding, stored)) };
        self.sealed.clear();
        cipher.seal_into(PURPOSE, stored, &mut self.sealed)?;
        Ok((encoding, &self.sealed))
    }
}

fn context(level: i32) -> Result<zstd::bulk::Compressor<'static>> {
    let mut context = zstd::bulk::Compressor::new(level).map_err(failed)?;
    if level == 1 {
        // zstd's own choice for inputs of this size takes a table of 2^13 entries. On documents, four times that costs a
        // tenth of the speed and makes the result a tenth smaller: smaller than gzip's at fifteen times its speed.
        for parameter in
            [CParameter::WindowLog(20), CParameter::HashLog(15), CParameter::MinMatch(7), CParameter::TargetLength(0)]
        {
            context.set_parameter(parameter).map_err(failed)?;
        }
    }
    Ok(context)
}

fn failed(error: std::io::Error) -> Error {
    Error::internal("zstd failed").with_source(error)
}

/// A zstd context for reading.
pub(crate) struct Decompressor(zstd::bulk::Decompressor<'static>);

impl Decompressor {
    /// The plain bytes of a stored block.
    pub(crate) fn open(&mut self, block: &Block, stored: &Bytes, cipher: Option<&Cipher>) -> std::io::Result<Bytes> {
        let compressed = match cipher {
            Some(cipher) => cipher
                .open(PURPOSE, stored)
                .ok_or_else(|| std::io::Error::other("the block was not sealed with this key"))?
                .into(),
            None => stored.clone(),
        };
        match block.encoding {
            Encoding::Plain => Ok(compressed),
            Encoding::Zstd => self.decompress(&compressed, block.plain).map(Bytes::from),
        }
    }

    pub(crate) fn new() -> Result<Self> {
        Ok(Self(zstd::bulk::Decompressor::new().map_err(failed)?))
    }

    pub(crate) fn decompress(&mut self, stored: &[u8], plain: u32) -> std::io::Result<Vec<u8>> {
        // The length comes from the archive: a block is one segment longer than full at most, and a segment hardly
        // longer than the largest document.
        if plain as usize > LARGEST_BLOCK {
            return Err(std::io::Error::other("the block claims to be larger than any block is"));
        }
        let bytes = self.0.decompress(stored, plain as usize)?;
        if bytes.len() != plain as usize {
            return Err(std::io::Error::other("the block is shorter than it should be"));
        }
        Ok(bytes)
    }
}

/// A block is closed when it holds this much.
const BLOCK_BYTES: usize = 1 << 20;
const NODE_BLOCK_BYTES: usize = 64 << 10;
const LARGEST_BLOCK: usize = 64 << 20;
/// What a block is sealed as.
const PURPOSE: &[u8] = b"block";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_compressed_comes_back_at_every_level(plain in proptest::collection::vec(0_u8..4, 0..5000), level in -3_i32..9) {
            let mut compressor = Compressor::default();
            let (encoding, stored) = compressor.compress(&plain, level, None).unwrap();
            let length = u32::try_from(plain.len()).unwrap();
            match encoding {
                Encoding::Plain => prop_assert_eq!(stored, &plain[..]),
                Encoding::Zstd => prop_assert_eq!(Decompressor::new().unwrap().decompress(stored, length).unwrap(), plain),
            }
        }

        #[test]
        fn noise_is_no_panic_and_no_block(noise in proptest::collection::vec(any::<u8>(), 0..200), plain in 0_u32..4 << 20) {
            prop_assert!(Decompressor::new().unwrap().decompress(&noise, plain).is_err() || plain == 0);
        }
    }

    #[test]
    fn a_block_of_another_length_than_its_entry_says_is_refused() {
        let mut compressor = Compressor::default();
        let (_, stored) = compressor.compress(&[7; 1000], 1, None).unwrap();
        let mut decompressor = Decompressor::new().unwrap();
        assert!(decompressor.decompress(stored, 999).is_err() && decompressor.decompress(stored, 1001).is_err());
    }
}

//! Reads streams in the framing of S2 and of Snappy, whose blocks are a subset of S2's.
//!
//! The format is that of the project klauspost/compress: a stream is chunks of a type and a length of three bytes; data carries a masked
//! CRC-32C of its plain bytes. A block is a length and then literals and copies; beyond Snappy it can repeat the last offset.

use std::io::{self, Read};

use crc::{CRC_32_ISCSI, Crc, Table};

/// Decompresses a stream as it is read.
pub(super) struct Decoder<R> {
    input: R,
    /// The plain bytes of a chunk, and how many of them were given out.
    plain: Vec<u8>,
    given: usize,
    /// The largest chunk that the kind of stream allows; none before the stream has said what it is.
    largest: Option<usize>,
}

impl<R: Read> Decoder<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, plain: Vec::new(), given: 0, largest: None }
    }

    /// Decodes the next chunk of data. False at the end.
    fn next_chunk(&mut self) -> io::Result<bool> {
        loop {
            let mut head = [0; 4];
            if !read_or_end(&mut self.input, &mut head)? {
                return Ok(false);
            }
            let [kind, length @ ..] = head;
            let length = usize::try_from(u32::from_le_bytes([length[0], length[1], length[2], 0])).unwrap_or(usize::MAX);
            match (kind, self.largest) {
                (IDENTIFIER, _) => self.largest = Some(self.identify(length)?),
                (_, None) => return Err(malformed("a stream does not begin with its identifier")),
                (COMPRESSED | PLAIN, Some(largest)) => {
                    self.data(kind, length, largest)?;
                    return Ok(true);
                }
                (0x80..=0xfe, Some(_)) => {
                    let skipped = io::copy(&mut (&mut self.input).take(length as u64), &mut io::sink())?;
                    if skipped != length as u64 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                _ => return Err(malformed("a chunk is of a kind that is not known")),
            }
        }
    }

    fn identify(&mut self, length: usize) -> io::Result<usize> {
        let mut magic = [0; 6];
        if length != magic.len() {
            return Err(malformed("the identifier of a stream is none"));
        }
        self.input.read_exact(&mut magic)?;
        match &magic {
            b"S2sTwO" => Ok(4 << 20),
            b"sNaPpY" => Ok(64 << 10),
            _ => Err(malformed("the identifier of a stream is none")),
        }
    }

    fn data(&mut self, kind: u8, length: usize, largest: usize) -> io::Result<()> {
        // A block that grows when it is compressed is stored plain; a little more is allowed for its length and literals.
        if !(4..=largest + largest / 6 + 64).contains(&length) {
            return Err(malformed("a chunk is longer than allowed"));
        }
        let mut sum = [0; 4];
        self.input.read_exact(&mut sum)?;
        let mut body = vec![0; length - sum.len()];
        self.input.read_exact(&mut body)?;
        self.plain = if kind == PLAIN { body } else { decode_block(&body, largest)? };
        self.given = 0;
        if self.plain.len() > largest {
            return Err(malformed("a chunk is longer than allowed"));
        }
        let crc = SUM.checksum(&self.plain);
        if crc.rotate_right(15).wrapping_add(0xa282_ead8) != u32::from_le_bytes(sum) {
            return Err(malformed("the checksum of a chunk does not match"));
        }
        Ok(())
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // A chunk may be empty; only the end of the stream is the end.
        while self.given == self.plain.len() {
            if !self.next_chunk()? {
                return Ok(0);
            }
        }
        let mut rest = &self.plain[self.given..];
        let read = rest.read(buffer)?;
        self.given += read;
        Ok(read)
    }
}

/// Fills the buffer, or finds that nothing is left.
fn read_or_end(input: &mut impl Read, buffer: &mut [u8; 4]) -> io::Result<bool> {
    let first = loop {
        match input.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => break read?,
        }
    };
    if first == 0 {
        return Ok(false);
    }
    input.read_exact(&mut buffer[first..])?;
    Ok(true)
}

/// Decodes a block of at most `largest` plain bytes.
fn decode_block(block: &[u8], largest: usize) -> io::Result<Vec<u8>> {
    let mut input = Input(block);
    let length = input.uvarint()?;
    if length > largest {
        return Err(malformed("a block is longer than allowed"));
    }
    let mut plain = Vec::with_capacity(length);
    let mut offset = 0;
    while !input.0.is_empty() {
        let tag = input.little_endian(1)?;
        let high = tag >> 2;
        let count = match tag & 3 {
            0 => {
                let count = if high < 60 { high } else { input.little_endian(high - 59)? } + 1;
                if count > length - plain.len() {
                    return Err(malformed("a block is longer than it says"));
                }
                plain.extend_from_slice(input.take(count)?);
                continue;
            }
            1 => {
                let to = (tag & 0xe0) << 3 | input.little_endian(1)?;
                let count = high & 7;
                if to == 0 {
                    match count {
                        5 => input.little_endian(1)? + 8,
                        6 => input.little_endian(2)? + 260,
                        7 => input.little_endian(3)? + 65540,
                        count => count + 4,
                    }
                } else {
                    offset = to;
                    count + 4
                }
            }
            kind => {
                offset = input.little_endian(if kind == 2 { 2 } else { 4 })?;
                high + 1
            }
        };
        if offset == 0 || offset > plain.len() || count > length - plain.len() {
            return Err(malformed("a block copies from where nothing is"));
        }
        // The copy may overlap itself: it repeats what it has just written.
        let mut left = count;
        while left > 0 {
            let start = plain.len() - offset;
            let step = left.min(offset);
            plain.extend_from_within(start..start + step);
            left -= step;
        }
    }
    if plain.len() == length { Ok(plain) } else { Err(malformed("a block is shorter than it says")) }
}

/// What is left of a block.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, count: usize) -> io::Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or_else(|| malformed("a block ends too early"))?;
        self.0 = rest;
        Ok(taken)
    }

    /// A number of up to four bytes.
    fn little_endian(&mut self, bytes: usize) -> io::Result<usize> {
        let bytes = self.take(bytes)?;
        Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    }

    fn uvarint(&mut self) -> io::Result<usize> {
        let mut number = 0_u64;
        for shift in [0, 7, 14, 21, 28] {
            let byte = self.little_endian(1)? as u64;
            number |= (byte & 0x7f) << shift;
            if byte < 0x80 {
                return usize::try_from(number).map_err(|_| malformed("a block is longer than allowed"));
            }
        }
        Err(malformed("a block is longer than allowed"))
    }
}

fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

const COMPRESSED: u8 = 0x00;
const PLAIN: u8 = 0x01;
const IDENTIFIER: u8 = 0xff;
static SUM: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chunk(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len()).unwrap().to_le_bytes();
        [&[kind, length[0], length[1], length[2]], body].concat()
    }

    fn data(kind: u8, plain: &[u8], stored: &[u8]) -> Vec<u8> {
        let sum = SUM.checksum(plain).rotate_right(15).wrapping_add(0xa282_ead8);
        chunk(kind, &[&sum.to_le_bytes(), stored].concat())
    }

    fn decoded(stream: &[u8]) -> io::Result<Vec<u8>> {
        let mut plain = Vec::new();
        Decoder::new(stream).read_to_end(&mut plain).map(|_| plain)
    }

    /// Literals and copies of every kind, each with what it stands for.
    fn every_element() -> (Vec<u8>, Vec<u8>) {
        let mut plain: Vec<u8> = (0..=255).collect();
        let mut block = vec![61 << 2, 255, 0];
        block.extend_from_slice(&plain);
        let copy = |plain: &mut Vec<u8>, offset: usize, count: usize| {
            for _ in 0..count {
                plain.push(plain[plain.len() - offset]);
            }
        };
        // One byte of offset: 300 is 1 << 8 | 44. A literal, so that it is there.
        block.extend_from_slice(&[59 << 2]);
        block.extend_from_slice(&[7; 60]);
        plain.extend_from_slice(&[7; 60]);
        block.extend_from_slice(&[1 << 5 | 3 << 2 | 1, 44]);
        copy(&mut plain, 300, 7);
        // Repeats, with lengths of none to three bytes.
        for (code, extra, count) in
            [(0, &[][..], 4), (4, &[], 8), (5, &[9], 17), (6, &[1, 1], 517), (7, &[2, 0, 1], 65540 + 65538)]
        {
            block.extend_from_slice(&[code << 2 | 1, 0]);
            block.extend_from_slice(extra);
            copy(&mut plain, 300, count);
        }
        // Two and four bytes of offset; the first overlaps itself.
        block.extend_from_slice(&[63 << 2 | 2, 3, 0]);
        copy(&mut plain, 3, 64);
        block.extend_from_slice(&[1 << 2 | 3, 0, 1, 1, 0]);
        copy(&mut plain, 0x1_0100, 2);
        let mut head = Vec::new();
        let mut left = plain.len();
        while left >= 0x80 {
            head.push(u8::try_from(left & 0x7f).unwrap() | 0x80);
            left >>= 7;
        }
        head.push(u8::try_from(left).unwrap());
        (plain, [head, block].concat())
    }

    #[test]
    fn every_kind_of_chunk_and_element_is_read() {
        let (plain, block) = every_element();
        let stream = [
            chunk(0xff, b"S2sTwO"),
            data(COMPRESSED, &plain, &block),
            chunk(0x99, b"an index to skip"),
            data(PLAIN, b"as it is", b"as it is"),
            chunk(0xff, b"sNaPpY"),
            data(PLAIN, b"", b""),
            data(COMPRESSED, b"snappy", &[6, 5 << 2, b's', b'n', b'a', b'p', b'p', b'y']),
        ];
        assert_eq!(decoded(&stream.concat()).unwrap(), [&plain[..], b"as it is", b"snappy"].concat());
        assert_eq!(decoded(b"").unwrap(), b"", "nothing is what nothing is written as");
    }

    #[test]
    fn a_stream_that_is_cut_off_or_changed_is_noticed() {
        let (plain, block) = every_element();
        let stream = [chunk(0xff, b"S2sTwO"), data(COMPRESSED, &plain, &block)].concat();
        for length in (1..stream.len()).filter(|length| *length != 10) {
            assert!(decoded(&stream[..length]).is_err(), "{length}");
        }
        for position in 0..stream.len() {
            let mut changed = stream.clone();
            changed[position] ^= 0x10;
            assert!(decoded(&changed).is_err(), "{position}");
        }
    }

    #[test]
    fn lengths_are_believed_only_within_limits() {
        let claims = [&[0xff, 0xff, 0xff, 0xff, 0x0f][..], &[0xff, 0xff, 0xff, 0xff, 0xff, 0x0f]];
        for claim in claims {
            assert!(decode_block(claim, 4 << 20).is_err());
        }
        assert!(decoded(&[chunk(0xff, b"sNaPpY"), vec![PLAIN, 0xff, 0xff, 0xff]].concat()).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(block in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_block(&block, 1 << 16);
            let _ = decoded(&[chunk(0xff, b"S2sTwO"), block].concat());
        }
    }
}

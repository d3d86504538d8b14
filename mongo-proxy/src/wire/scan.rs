//! An OP_MSG, checked as it comes.
//!
//! A message of 48 megabytes is not kept: each document of it is checked when it is there as a whole, and may be passed on then. Only the last byte of a message makes a server act on it, and that is passed on only
//! when everything before it has been checked.

use std::{fmt, ops::Range};

use crc::{Crc, Digest, Table};

use super::{
    Malformed, bson_scan,
    header::{HEADER, Header},
};

/// That the last four bytes are a checksum of all before them.
pub(crate) const CHECKSUM_PRESENT: u32 = 1;
/// In a request, that no reply is awaited; in a reply, that another one follows.
pub(crate) const MORE_TO_COME: u32 = 1 << 1;
/// That more than one reply may come.
pub(crate) const EXHAUST_ALLOWED: u32 = 1 << 16;
/// Of these bits, whoever does not know one must refuse the message.
const REQUIRED: u32 = 0xffff;
/// The longest name of a sequence. A server knows a handful, of nine letters at most.
const LONGEST_NAME: usize = 64;
/// Sequences of a message: a bulk write has two.
const MOST_SEQUENCES: usize = 8;
const CHECKSUM: usize = 4;

static CRC_32C: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&crc::CRC_32_ISCSI);

/// Checks one message, piece by piece.
pub(crate) struct Scan {
    header: Header,
    length: usize,
    /// Bytes of the message, its header included, that were checked.
    at: usize,
    state: State,
    flags: u32,
    /// Where the body is, once it was seen as a whole.
    body: Option<Range<usize>>,
    /// The sequences that were seen, and where their documents are.
    sequences: Vec<(Vec<u8>, Range<usize>)>,
    digest: Option<Digest<'static, u32, Table<16>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Flags,
    /// The kind of the next section, or the end.
    Section,
    Body,
    /// The length and the name of a sequence.
    Name,
    /// The documents of a sequence, until there.
    Documents(usize),
    Checksum,
    End,
}

impl Scan {
    pub(crate) fn new(header: Header) -> Self {
        Self {
            header,
            length: header.length,
            at: HEADER,
            state: State::Flags,
            flags: 0,
            body: None,
            sequences: Vec::new(),
            digest: None,
        }
    }

    /// Checks what is there of what comes after what was checked, and says how much that is. Of an element that is not there as a whole nothing is.
    pub(crate) fn advance(&mut self, bytes: &[u8]) -> Result<usize, Malformed> {
        let mut done = 0;
        while self.state != State::End {
            let Some(element) = self.element(&bytes[done..])? else { break };
            let taken = &bytes[done..done + element];
            // The checksum itself has ended it.
            if let Some(digest) = &mut self.digest {
                digest.update(taken);
            }
            done += element;
            self.at += element;
            if self.state == State::Section && self.at == self.sections_end() {
                self.state = self.after_sections()?;
            }
        }
        Ok(done)
    }

    /// Whether all of it was checked.
    pub(crate) fn is_complete(&self) -> bool {
        self.state == State::End
    }

    pub(crate) fn flags(&self) -> u32 {
        self.flags
    }

    /// Where the body is in the message, once it was seen.
    pub(crate) fn body(&self) -> Option<Range<usize>> {
        self.body.clone()
    }

    /// Where the documents of a sequence are in the message, once its name was seen.
    pub(crate) fn sequence(&self, name: &str) -> Option<Range<usize>> {
        self.sequences.iter().find(|(known, _)| known == name.as_bytes()).map(|(_, documents)| documents.clone())
    }

    fn sections_end(&self) -> usize {
        self.length - if self.flags & CHECKSUM_PRESENT == 0 { 0 } else { CHECKSUM }
    }

    fn after_sections(&self) -> Result<State, Malformed> {
        match (&self.body, self.flags & CHECKSUM_PRESENT) {
            (None, _) => Err(Malformed::Section),
            (Some(_), 0) => Ok(State::End),
            (Some(_), _) => Ok(State::Checksum),
        }
    }

    /// Checks one element and says how long it is; nothing if it is not there as a whole.
    fn element(&mut self, bytes: &[u8]) -> Result<Option<usize>, Malformed> {
        let end = match self.state {
            State::Documents(end) => end,
            State::Flags | State::Checksum => self.length,
            _ => self.sections_end(),
        };
        // What the element may have, and what of that is there.
        let room = end.checked_sub(self.at).ok_or(Malformed::Bounds)?;
        let bytes = &bytes[..bytes.len().min(room)];
        match self.state {
            State::Flags => {
                let Some(flags) = self.number(bytes, room)? else { return Ok(None) };
                if flags & REQUIRED & !(CHECKSUM_PRESENT | MORE_TO_COME) != 0 {
                    return Err(Malformed::Flags);
                }
                self.flags = flags;
                if flags & CHECKSUM_PRESENT != 0 {
                    // Of the header, and of the flags when they are taken.
                    let mut bytes = Vec::with_capacity(HEADER);
                    self.header.write(&mut bytes);
                    let mut digest = CRC_32C.digest();
                    digest.update(&bytes);
                    self.digest = Some(digest);
                }
                if self.length < HEADER + 4 + CHECKSUM {
                    return Err(Malformed::Bounds);
                }
                self.state = State::Section;
                Ok(Some(4))
            }
            State::Section => {
                let Some(kind) = bytes.first() else { return Ok(None) };
                self.state = match kind {
                    0 if self.body.is_none() => State::Body,
                    1 if self.sequences.len() < MOST_SEQUENCES => State::Name,
                    _ => return Err(Malformed::Section),
                };
                Ok(Some(1))
            }
            State::Body => {
                let length = Self::document(bytes, room)?;
                if let Some(length) = length {
                    self.body = Some(self.at..self.at + length);
                    self.state = State::Section;
                }
                Ok(length)
            }
            State::Name => {
                let Some(size) = self.number(bytes, room)? else { return Ok(None) };
                let size = usize::try_from(size).ok().filter(|size| *size <= room).ok_or(Malformed::Bounds)?;
                let rest = &bytes[4..bytes.len().min(size).max(4)];
                let Some(length) = rest.iter().take(LONGEST_NAME + 1).position(|byte| *byte == 0) else {
                    let is_all = rest.len() > LONGEST_NAME || bytes.len() >= size;
                    return if is_all { Err(Malformed::Section) } else { Ok(None) };
                };
                let name = rest[..length].to_vec();
                if name.is_empty() || self.sequences.iter().any(|(known, _)| *known == name) {
                    return Err(Malformed::Section);
                }
                let (from, end) = (self.at + 4 + length + 1, self.at + size);
                self.sequences.push((name, from..end));
                self.state = self.documents_until(end, from);
                Ok(Some(4 + length + 1))
            }
            State::Documents(end) => {
                let length = Self::document(bytes, room)?;
                if let Some(length) = length {
                    self.state = self.documents_until(end, self.at + length);
                }
                Ok(length)
            }
            State::Checksum => {
                let Some(checksum) = self.number(bytes, room)? else { return Ok(None) };
                if self.digest.take().map(|digest| digest.finalize()) != Some(checksum) {
                    return Err(Malformed::Checksum);
                }
                self.state = State::End;
                Ok(Some(CHECKSUM))
            }
            State::End => Ok(None),
        }
    }

    fn documents_until(&self, end: usize, at: usize) -> State {
        if at == end { State::Section } else { State::Documents(end) }
    }

    /// Four bytes, for which there must be room.
    fn number(&self, bytes: &[u8], room: usize) -> Result<Option<u32>, Malformed> {
        if room < 4 {
            return Err(Malformed::Bounds);
        }
        Ok(bytes.first_chunk().copied().map(u32::from_le_bytes))
    }

    /// A document, for which there must be room.
    fn document(bytes: &[u8], room: usize) -> Result<Option<usize>, Malformed> {
        if room < 4 {
            return Err(Malformed::Bounds);
        }
        let Some(length) = bson_scan::length_of(bytes)? else { return Ok(None) };
        if length > room {
            return Err(Malformed::Bounds);
        }
        let Some(document) = bytes.get(..length) else { return Ok(None) };
        bson_scan::check(document)?;
        Ok(Some(length))
    }
}

impl fmt::Debug for Scan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { length, at, state, flags, body, .. } = self;
        f.debug_struct("Scan")
            .field("length", length)
            .field("at", at)
            .field("state", state)
            .field("flags", flags)
            .field("body", body)
            .finish_non_exhaustive()
    }
}

//! The sixteen bytes that every message begins with.

use super::Malformed;

/// A message's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Of the whole message, the header included.
    pub(crate) length: usize,
    pub(crate) request_id: i32,
    pub(crate) response_to: i32,
    pub(crate) opcode: Opcode,
}

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opcode {
    /// All that clients and servers of today send.
    Message,
    /// Another message, compressed.
    Compressed,
    /// The first hello of some drivers.
    Query,
    /// The answer to that.
    Reply,
}

impl Opcode {
    pub(crate) fn number(self) -> i32 {
        match self {
            Self::Reply => 1,
            Self::Query => 2004,
            Self::Compressed => 2012,
            Self::Message => 2013,
        }
    }

    pub(crate) fn of(number: i32) -> Option<Self> {
        [Self::Message, Self::Compressed, Self::Query, Self::Reply].into_iter().find(|opcode| opcode.number() == number)
    }
}

pub(crate) const HEADER: usize = 16;
/// The longest message that a server takes (`maxMessageSizeBytes`).
pub(crate) const LONGEST: usize = 48_000_000;

impl Header {
    /// Reads a header, whose length is within bounds then.
    pub(crate) fn read(bytes: &[u8; HEADER]) -> Result<Self, Malformed> {
        let [length, request_id, response_to, opcode] =
            [0, 4, 8, 12].map(|at| i32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]));
        let length = usize::try_from(length).map_err(|_| Malformed::Length)?;
        if !(HEADER..=LONGEST).contains(&length) {
            return Err(Malformed::Length);
        }
        let opcode = Opcode::of(opcode).ok_or(Malformed::Opcode)?;
        Ok(Self { length, request_id, response_to, opcode })
    }

    pub(crate) fn write(self, to: &mut Vec<u8>) {
        // Lengths are at most LONGEST.
        let length = i32::try_from(self.length).unwrap_or(i32::MAX);
        for number in [length, self.request_id, self.response_to, self.opcode.number()] {
            to.extend_from_slice(&number.to_le_bytes());
        }
    }
}

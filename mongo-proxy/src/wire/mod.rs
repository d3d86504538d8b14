//! The wire protocol: what is read of a message, and how it is checked before anybody acts on it.
//!
//! Everything here comes from outside. Nothing is allocated on the word of a length, and nothing is read twice in two ways: [`scan`] is the one place that says whether a message is well formed.

pub(crate) mod bson_scan;
pub(crate) mod compression;
pub(crate) mod header;
pub(crate) mod query;
pub(crate) mod refusal;
pub(crate) mod reply;
pub(crate) mod rewrite;
pub(crate) mod scan;
#[cfg(test)]
mod tests;

use std::fmt;

/// Why a message is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Malformed {
    /// Its length is less than that of a header, or more than a server takes.
    Length,
    /// Its opcode is none that a client of today sends.
    Opcode,
    /// It has a flag that must be known and is not.
    Flags,
    /// A section is of no kind that there is, there is not exactly one body, or a sequence has no name or one that was there already.
    Section,
    /// A length inside it leads out of it, or it ends too early or too late.
    Bounds,
    /// A value in it is of a type that there is not, or is not what its type says.
    Bson,
    /// Documents in it are within each other more than [`DEEPEST`](bson_scan::DEEPEST) times.
    Depth,
    /// Its checksum is not that of its bytes.
    Checksum,
    /// It is compressed in a way that was not agreed on, or inflates to another length than it says, or holds what must not be compressed.
    Compression,
    /// Before the first answer messages are short, and not compressed: nothing was agreed on yet. And they are short until somebody has logged in, where a
    /// server wants that.
    First,
}

impl Malformed {
    pub(crate) const ALL: [Self; 10] = [
        Self::Length,
        Self::Opcode,
        Self::Flags,
        Self::Section,
        Self::Bounds,
        Self::Bson,
        Self::Depth,
        Self::Checksum,
        Self::Compression,
        Self::First,
    ];

    /// As it is called in metrics and in the log.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::Opcode => "opcode",
            Self::Flags => "flags",
            Self::Section => "section",
            Self::Bounds => "bounds",
            Self::Bson => "bson",
            Self::Depth => "depth",
            Self::Checksum => "checksum",
            Self::Compression => "compression",
            Self::First => "first",
        }
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

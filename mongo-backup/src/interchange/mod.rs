//! Exchange with MongoDB's own tools: mongodump's directories and archives, both ways, and Percona's logical backups, inwards.
//!
//! What these formats hold and snapshots do not is named in the reports and never dropped silently.

mod archive;
mod directory;
mod export;
mod import;
mod metadata;
mod names;
mod percona;
mod s2;

pub use export::{Export, ExportReport};
pub use import::{Import, ImportReport};

#[cfg(fuzzing)]
pub(crate) mod fuzzing {
    pub(crate) fn archive(bytes: &[u8]) {
        let _ = super::archive::read(bytes, &mut |_| Ok(()));
        let _ = std::io::copy(&mut super::s2::Decoder::new(bytes), &mut std::io::sink());
    }

    pub(crate) fn metadata(text: &str) {
        let _ = super::metadata::Metadata::parse(text);
        let _ = super::names::unescape(text);
    }
}

use mongo_core::{Namespace, transfer::catalog::CollectionEntry};

/// What a reader of a foreign format finds, in order.
#[derive(Debug)]
pub(crate) enum Found {
    /// The version of the server that was dumped.
    Server(String),
    /// A collection or view; its documents follow.
    Collection(CollectionEntry),
    /// Whole documents of a collection, back to back, as they were stored.
    Documents(Namespace, Vec<u8>),
    /// A collection has no more documents.
    End(Namespace),
    /// Something that a snapshot does not hold.
    LeftOut(String, String),
}

/// So many bytes of documents are handed on at once.
pub(crate) const PIECE: usize = 1 << 20;
/// The longest document that a server sends: 16 MiB, and 16 KiB for what oplog entries add.
pub(crate) const LONGEST_DOCUMENT: usize = (16 << 20) + (16 << 10);

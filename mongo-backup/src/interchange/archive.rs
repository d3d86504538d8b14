//! mongodump's archive: one stream in which collections may be interleaved.
//!
//! ```text
//! magic 6d e2 99 81, a BSON document about the dump, one about each collection, ff ff ff ff
//! then blocks: a header {db, collection, EOF: false, CRC: 0}, documents, ff ff ff ff
//! and at the end of each collection: {db, collection, EOF: true, CRC}, ff ff ff ff
//! ```
//! The sum is CRC-64/XZ over a collection's documents. Source: `common/archive/spec.md` of mongo-tools.

use std::{
    collections::BTreeMap,
    io::{ErrorKind as Io, Read, Write},
};

use crc::{CRC_64_XZ, Crc, Digest, Table};
use mongo_core::{
    Error, ErrorKind, Namespace, Result,
    bson::{RawDocument, RawDocumentBuf, rawdoc},
    transfer::{
        catalog::{CollectionKind, USERS_AND_ROLES},
        check_structure,
    },
};

use super::{Found, LONGEST_DOCUMENT, PIECE, metadata::Metadata};

/// Writes an archive.
#[derive(Debug)]
pub(super) struct ArchiveWriter<W> {
    out: W,
}

/// A collection as the archive announces it.
pub(super) struct Announced<'a> {
    pub(super) namespace: &'a Namespace,
    pub(super) metadata: String,
    pub(super) bytes: u64,
    pub(super) kind: &'static str,
}

impl<W: Write> ArchiveWriter<W> {
    /// Begins an archive: everything that it will hold must be known.
    pub(super) fn begin(mut out: W, server: &str, tool: &str, collections: &[Announced<'_>]) -> std::io::Result<Self> {
        out.write_all(&MAGIC)?;
        let about = rawdoc! { "concurrent_collections": 1, "version": "0.1", "server_version": server, "tool_version": tool };
        out.write_all(about.as_bytes())?;
        for collection in collections {
            let mut about = rawdoc! {
                "db": collection.namespace.database(), "collection": collection.namespace.collection(), "metadata": &*collection.metadata,
            };
            let key = mongo_core::bson::cstr!("size");
            match i32::try_from(collection.bytes) {
                Ok(small) => about.append(key, small),
                Err(_) => about.append(key, i64::try_from(collection.bytes).unwrap_or(i64::MAX)),
            }
            about.append(mongo_core::bson::cstr!("type"), collection.kind);
            out.write_all(about.as_bytes())?;
        }
        out.write_all(&TERMINATOR)?;
        Ok(Self { out })
    }

    /// Begins the documents of a collection; an empty collection has none and is begun all the same.
    pub(super) fn open(&mut self, data: &Namespace) -> std::io::Result<CollectionWriter<'_, W>> {
        self.out.write_all(header(data, false, 0).as_bytes())?;
        Ok(CollectionWriter { data: data.clone(), sum: SUM.digest(), archive: self })
    }

    /// Ends the archive.
    pub(super) fn finish(mut self) -> std::io::Result<W> {
        self.out.flush()?;
        Ok(self.out)
    }
}

pub(super) struct CollectionWriter<'a, W> {
    archive: &'a mut ArchiveWriter<W>,
    data: Namespace,
    sum: Digest<'static, u64, Table<16>>,
}

impl<W: Write> CollectionWriter<'_, W> {
    /// Writes whole documents.
    pub(super) fn write(&mut self, documents: &[u8]) -> std::io::Result<()> {
        self.sum.update(documents);
        self.archive.out.write_all(documents)
    }

    pub(super) fn close(self) -> std::io::Result<()> {
        let out = &mut self.archive.out;
        out.write_all(&TERMINATOR)?;
        out.write_all(header(&self.data, true, self.sum.finalize().cast_signed()).as_bytes())?;
        out.write_all(&TERMINATOR)
    }
}

fn header(data: &Namespace, eof: bool, sum: i64) -> RawDocumentBuf {
    rawdoc! { "db": data.database(), "collection": data.collection(), "EOF": eof, "CRC": sum }
}

/// Reads an archive, handing on what it holds.
///
/// # Errors
/// `CorruptData` naming what is damaged, truncated or not closed; `Unsupported` for another version; what `found` returns.
pub(super) fn read(input: impl Read, found: &mut impl FnMut(Found) -> Result<()>) -> Result<()> {
    let mut input = Frames { input };
    if input.bytes::<4>()? != Some(MAGIC) {
        return Err(Error::corrupt("this is no archive of mongodump, or it is compressed: check --gzip"));
    }
    let about = input.document()?.ok_or_else(truncated)?;
    if about.get_str("version").unwrap_or_default() != "0.1" {
        return Err(Error::new(ErrorKind::Unsupported, "the archive is of a version that is not known here"));
    }
    let server = about.get_str("server_version").unwrap_or_default().to_owned();
    let viewless = viewless_time_series(&server);
    found(Found::Server(server))?;
    // By the name under which documents travel.
    let mut open: BTreeMap<(String, String), Open> = BTreeMap::new();
    while let Some(about) = input.terminated()? {
        let (database, collection) = names(&about)?;
        let text = about.get_str("metadata").unwrap_or_default();
        let named = |error: Error| error.with_context("namespace", format!("{database}.{collection}"));
        let metadata = Metadata::parse(text).map_err(named)?;
        let kept = match left_out(&database, &collection) {
            Some(reason) => {
                found(Found::LeftOut(format!("{database}.{collection}"), reason.to_owned()))?;
                None
            }
            None => {
                let namespace = Namespace::new(database.clone(), collection.clone())?;
                let entry =
                    Metadata { kind: about.get_str("type").ok().map(str::to_owned).or(metadata.kind.clone()), ..metadata }
                        .entry(namespace.clone())
                        .map_err(named)?;
                let kind = entry.kind();
                found(Found::Collection(entry))?;
                Some((namespace, kind))
            }
        };
        let data = match &kept {
            Some((_, CollectionKind::TimeSeries)) if !viewless => format!("system.buckets.{collection}"),
            _ => collection,
        };
        open.insert(
            (database, data),
            Open { namespace: kept.map(|(namespace, _)| namespace), sum: SUM.digest(), pending: Vec::new() },
        );
    }
    while let Some(header) = input.document()? {
        let key = names(&header)?;
        let collection = open.get_mut(&key).ok_or_else(|| {
            Error::corrupt("the archive goes on with a collection that it has not announced, or has ended")
                .with_context("namespace", format!("{}.{}", key.0, key.1))
        })?;
        while let Some(document) = input.terminated()? {
            collection.sum.update(document.as_bytes());
            let Some(namespace) = &collection.namespace else { continue };
            check_structure(&document).map_err(|error| error.with_context("namespace", namespace))?;
            collection.pending.extend_from_slice(document.as_bytes());
            if collection.pending.len() >= PIECE {
                found(Found::Documents(namespace.clone(), std::mem::take(&mut collection.pending)))?;
            }
        }
        if header.get_bool("EOF").unwrap_or(false)
            && let Some(Open { namespace, sum, pending }) = open.remove(&key)
        {
            if header.get_i64("CRC").ok() != Some(sum.finalize().cast_signed()) {
                return Err(Error::corrupt("the checksum of a collection does not match: the archive is damaged")
                    .with_context("namespace", format!("{}.{}", key.0, key.1)));
            }
            if let Some(namespace) = namespace {
                if !pending.is_empty() {
                    found(Found::Documents(namespace.clone(), pending))?;
                }
                found(Found::End(namespace))?;
            }
        }
        if open.is_empty() {
            break;
        }
    }
    match open.into_keys().next() {
        Some((database, collection)) => {
            Err(Error::corrupt("the archive ends before all of its collections do: it was truncated")
                .with_context("namespace", format!("{database}.{collection}")))
        }
        None => Ok(()),
    }
}

struct Open {
    /// None where the documents are passed over.
    namespace: Option<Namespace>,
    sum: Digest<'static, u64, Table<16>>,
    pending: Vec<u8>,
}

fn names(document: &RawDocument) -> Result<(String, String)> {
    let text = |key| {
        document
            .get_str(key)
            .map(str::to_owned)
            .map_err(|error| Error::corrupt("the archive has a malformed header").with_source(error))
    };
    Ok((text("db")?, text("collection")?))
}

/// Why a snapshot does not hold something that a dump can.
pub(super) fn left_out(database: &str, collection: &str) -> Option<&'static str> {
    match (database, collection) {
        ("", "oplog") => Some("an oplog is not replayed: the documents are as each was read"),
        (_, "system.indexes") => Some("indexes of servers before 3.0 are not read"),
        ("admin", collection) if USERS_AND_ROLES.contains(&collection) => None,
        ("admin", collection) if collection.starts_with("mongo_backup.") => Some("kept by restores for themselves"),
        (_, collection) if collection.starts_with("$admin.") => {
            Some("users and roles of a single database are not part of a snapshot")
        }
        ("config" | "local", _) => Some("belongs to the server itself"),
        ("admin", collection) if collection.starts_with("system.") => Some("belongs to the server itself"),
        _ => None,
    }
}

/// From 8.3 on the documents of a time-series collection travel under its own name.
pub(super) fn viewless_time_series(server: &str) -> bool {
    let mut numbers = server.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (8, 3)
}

/// Reads documents from a stream.
pub(super) struct Frames<R> {
    pub(super) input: R,
}

impl<R: Read> Frames<R> {
    /// So many bytes; none at the end of the stream.
    fn bytes<const N: usize>(&mut self) -> Result<Option<[u8; N]>> {
        let mut bytes = [0; N];
        let mut filled = 0;
        while filled < N {
            match self.input.read(&mut bytes[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(truncated()),
                Ok(read) => filled += read,
                Err(error) if error.kind() == Io::Interrupted => {}
                Err(error) => return Err(unreadable(error)),
            }
        }
        Ok(Some(bytes))
    }

    /// The next document; none at the end of the stream.
    pub(super) fn document(&mut self) -> Result<Option<RawDocumentBuf>> {
        match self.bytes::<4>()? {
            Some(length) => self.rest_of(length).map(Some),
            None => Ok(None),
        }
    }

    /// The next document; none at a terminator, which must come.
    fn terminated(&mut self) -> Result<Option<RawDocumentBuf>> {
        match self.bytes::<4>()?.ok_or_else(truncated)? {
            TERMINATOR => Ok(None),
            length => self.rest_of(length).map(Some),
        }
    }

    fn rest_of(&mut self, length: [u8; 4]) -> Result<RawDocumentBuf> {
        let size = usize::try_from(i32::from_le_bytes(length)).unwrap_or(0);
        if !(5..=LONGEST_DOCUMENT).contains(&size) {
            return Err(Error::corrupt("there is something that is no document: the dump is damaged"));
        }
        let mut bytes = Vec::with_capacity(size.min(PIECE));
        bytes.extend_from_slice(&length);
        // Not allocated at once: the length may be a lie.
        let read = (&mut self.input).take((size - 4) as u64).read_to_end(&mut bytes).map_err(unreadable)?;
        if read != size - 4 {
            return Err(truncated());
        }
        RawDocumentBuf::from_bytes(bytes)
            .map_err(|error| Error::corrupt("there is something that is no document: the dump is damaged").with_source(error))
    }
}

fn truncated() -> Error {
    Error::corrupt("the dump ends in the middle of something: it was truncated")
}

fn unreadable(error: std::io::Error) -> Error {
    match error.kind() {
        Io::UnexpectedEof | Io::InvalidData | Io::InvalidInput => {
            Error::corrupt("the dump cannot be decompressed: it is damaged or truncated, or not compressed").with_source(error)
        }
        _ => Error::new(ErrorKind::Unavailable, "the dump cannot be read").with_source(error),
    }
}

const MAGIC: [u8; 4] = [0x6d, 0xe2, 0x99, 0x81];
const TERMINATOR: [u8; 4] = [0xff; 4];
pub(super) static SUM: Crc<u64, Table<16>> = Crc::<u64, Table<16>>::new(&CRC_64_XZ);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn document(number: i32) -> RawDocumentBuf {
        rawdoc! { "_id": number, "text": "x".repeat(usize::try_from(number % 50).unwrap()) }
    }

    fn sample(counts: &[i32]) -> Vec<u8> {
        let names: Vec<Namespace> = (0..counts.len()).map(|number| format!("db.c{number}").parse().unwrap()).collect();
        let announced: Vec<Announced<'_>> = names
            .iter()
            .map(|namespace| Announced { namespace, metadata: Metadata::default().to_text(), bytes: 0, kind: "collection" })
            .collect();
        let mut archive = ArchiveWriter::begin(Vec::new(), "6.0.5", "test", &announced).unwrap();
        for (name, count) in names.iter().zip(counts) {
            let mut collection = archive.open(name).unwrap();
            for number in 0..*count {
                collection.write(document(number).as_bytes()).unwrap();
            }
            collection.close().unwrap();
        }
        archive.finish().unwrap()
    }

    /// How many documents each collection has, if the archive can be read.
    fn counts(bytes: &[u8]) -> Result<BTreeMap<String, usize>> {
        let mut counts = BTreeMap::new();
        read(bytes, &mut |found| {
            match found {
                Found::Collection(entry) => {
                    counts.insert(entry.namespace().to_string(), 0);
                }
                Found::Documents(namespace, documents) => {
                    let count = crate::repository::documents_of(&documents).count();
                    *counts.entry(namespace.to_string()).or_default() += count;
                }
                _ => {}
            }
            Ok(())
        })?;
        Ok(counts)
    }

    #[test]
    fn the_checksum_is_the_one_of_the_specification() {
        assert_eq!(SUM.checksum(b"123456789"), 0x995d_c9bb_df19_39fa);
    }

    #[test]
    fn truncation_at_any_byte_is_noticed() {
        let bytes = sample(&[3, 0, 2]);
        assert_eq!(counts(&bytes).unwrap().into_values().collect::<Vec<_>>(), [3, 0, 2]);
        for length in 0..bytes.len() {
            assert_eq!(counts(&bytes[..length]).unwrap_err().kind(), ErrorKind::CorruptData, "{length} of {}", bytes.len());
        }
    }

    #[test]
    fn any_flipped_byte_of_a_document_is_noticed_and_no_flipped_byte_is_a_panic() {
        let bytes = sample(&[3]);
        let start = bytes.windows(4).position(|four| four == TERMINATOR).unwrap() + 4;
        for position in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[position] ^= 0x10;
            let read = counts(&flipped);
            if position > start + 60 && position < bytes.len() - 70 {
                assert!(read.is_err(), "byte {position}");
            }
        }
    }

    proptest! {
        #[test]
        fn archives_read_as_they_were_written(numbers in proptest::collection::vec(0_i32..80, 0..6)) {
            let read: Vec<usize> = counts(&sample(&numbers)).unwrap().into_values().collect();
            prop_assert_eq!(read, numbers.iter().map(|number| usize::try_from(*number).unwrap()).collect::<Vec<_>>());
        }

        #[test]
        fn noise_is_no_panic(noise in proptest::collection::vec(any::<u8>(), 0..300), with_magic: bool) {
            let bytes = if with_magic { [&MAGIC[..], &noise].concat() } else { noise };
            prop_assert!(counts(&bytes).is_err());
        }
    }
}

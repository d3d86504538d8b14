//! Logical backups of Percona Backup for MongoDB: the folder of one replica set.
//!
//! Beside `metadata.json`, which is never compressed, lies a file of documents for each namespace that has any, named `<db>.<collection>` and
//! the ending of the compression. A time-series collection's file is named after itself, not after its buckets. Large files are split:
//! what is missing in `name` goes on in `name.pbmpart.1`. Two folders up lies `<backup>.pbm.json`, which says how the backup ended.

use std::{
    cell::RefCell,
    fs::File,
    io::{BufReader, Read},
    path::{Component, Path, PathBuf},
    rc::Rc,
};

use flate2::read::MultiGzDecoder;
use mongo_core::{
    Error, ErrorKind, Namespace, Result,
    bson::{Bson, Document},
    transfer::catalog::CollectionKind,
};
use serde::Deserialize;

use super::{
    Found, archive,
    directory::{read_documents, unreadable},
    metadata::Metadata,
    s2,
};

/// Reads a backup, handing on what it holds.
///
/// # Errors
/// `NotFound` if there is none, `CorruptData` naming the file that is damaged, truncated or missing, `Conflict` for a backup that has not ended
/// well, `Unsupported` for one that is not logical; what `found` returns.
pub(super) fn read(folder: &Path, found: &mut dyn FnMut(Found) -> Result<()>) -> Result<()> {
    let about = Contents::read(folder)?;
    let compression = match outcome(folder)? {
        Some(outcome) => outcome.compression()?,
        None => about.guess_compression(folder)?,
    };
    found(Found::Server(about.server.clone()))?;
    if folder.join("oplog").is_dir() || folder.join(format!("local.oplog.rs.bson{}", compression.ending())).is_file() {
        let reason = "the oplog is not replayed, so the documents are as each was read and not as of one time";
        found(Found::LeftOut("oplog".to_owned(), reason.to_owned()))?;
    }
    for namespace in about.namespaces {
        read_namespace(folder, compression, &about.server, namespace, found)?;
    }
    Ok(())
}

fn read_namespace(
    folder: &Path,
    compression: Compression,
    server: &str,
    about: Described,
    found: &mut dyn FnMut(Found) -> Result<()>,
) -> Result<()> {
    let Described { database, collection, .. } = &about;
    let named = format!("{database}.{collection}");
    if let Some(reason) = left_out(database, collection) {
        return found(Found::LeftOut(named, reason.to_owned()));
    }
    let name = Namespace::new(database.clone(), collection.clone())?;
    let metadata = Metadata::parse(&about.metadata).map_err(|error| error.with_context("namespace", &name))?;
    let entry = Metadata { kind: about.kind.or(metadata.kind.clone()), ..metadata }.entry(name.clone())?;
    let kind = entry.kind();
    if kind == CollectionKind::TimeSeries && archive::viewless_time_series(server) {
        let reason = "backups of MongoDB 8.3 and newer do not hold the documents of time-series collections";
        return found(Found::LeftOut(named, reason.to_owned()));
    }
    found(Found::Collection(entry))?;
    if kind != CollectionKind::View {
        let file = file_of(folder, &named, compression)?;
        let sum = Rc::new(RefCell::new((archive::SUM.digest(), 0_i64)));
        if file.is_file() {
            let input = compression.open(&file)?;
            read_documents(&file, Summed { input, sum: Rc::clone(&sum) }, &name, &mut |item| found(item))?;
        } else if about.size != Some(0) {
            // Only of a collection without documents no file is written.
            return Err(Error::corrupt("the file of a collection is missing from the backup")
                .with_context("namespace", name)
                .with_context("file", file.display()));
        }
        let (digest, bytes) = sum.borrow().clone();
        let right_size = about.size.is_none_or(|size| size == bytes);
        if !right_size || about.crc.is_some_and(|crc| crc != digest.finalize().cast_signed()) {
            return Err(Error::corrupt("the checksum of a collection does not match: the backup is damaged")
                .with_context("namespace", name)
                .with_context("file", file.display()));
        }
    }
    found(Found::End(name))
}

/// Why a snapshot does not hold a collection of a backup.
fn left_out(database: &str, collection: &str) -> Option<&'static str> {
    match (database, collection) {
        ("admin", "pbmRUsers" | "pbmRRoles") => Some("users and roles of a backup of chosen namespaces are not read"),
        // Among them the place of the backups and what opens it.
        ("admin", collection) if collection.starts_with("pbm") => Some("belongs to Percona Backup for MongoDB itself"),
        _ => archive::left_out(database, collection),
    }
}

/// The file of a namespace, whose name goes into it as it is.
fn file_of(folder: &Path, named: &str, compression: Compression) -> Result<PathBuf> {
    let relative = PathBuf::from(format!("{named}{}", compression.ending()));
    if !relative.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(Error::corrupt("the name of a collection leads out of the backup").with_context("namespace", named));
    }
    Ok(folder.join(relative))
}

/// What `metadata.json` says.
struct Contents {
    server: String,
    namespaces: Vec<Described>,
}

/// What it says of a namespace.
struct Described {
    database: String,
    collection: String,
    metadata: String,
    kind: Option<String>,
    /// CRC-64 and number of the plain bytes.
    crc: Option<i64>,
    size: Option<i64>,
}

impl Contents {
    fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("metadata.json");
        let mut text = String::new();
        let parts = Parts::open(&path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::new(
                ErrorKind::NotFound,
                "there is no metadata.json: name the folder of a replica set, as <storage>/<backup>/<replica set>",
            )
            .with_context("path", folder.display()),
            _ => error,
        });
        parts?.read_to_string(&mut text).map_err(|error| unreadable(&path, error))?;
        let wrong = || Error::corrupt("this is no metadata of a logical backup").with_context("file", path.display());
        let json: serde_json::Value = serde_json::from_str(&text).map_err(|error| wrong().with_source(error))?;
        // Extended JSON: its 64-bit numbers are documents.
        let Bson::Document(about) = Bson::try_from(json).map_err(|error| wrong().with_source(error))? else {
            return Err(wrong());
        };
        Self::from_document(&about).ok_or_else(wrong)
    }

    fn from_document(about: &Document) -> Option<Self> {
        let text = |document: &Document, key: &str| document.get_str(key).map(str::to_owned).ok();
        let number = |document: &Document, key: &str| match document.get(key) {
            Some(Bson::Int64(number)) => Some(*number),
            Some(Bson::Int32(number)) => Some(i64::from(*number)),
            _ => None,
        };
        let described = |namespace: &Bson| {
            let namespace = namespace.as_document()?;
            Some(Described {
                database: text(namespace, "db")?,
                collection: text(namespace, "collection")?,
                metadata: text(namespace, "metadata").unwrap_or_default(),
                kind: text(namespace, "type").filter(|kind| !kind.is_empty()),
                crc: number(namespace, "crc"),
                size: number(namespace, "size"),
            })
        };
        let namespaces = about.get_array("namespaces").ok()?.iter().map(described).collect::<Option<_>>()?;
        Some(Self { server: text(about, "server_version").unwrap_or_else(|| "unknown".to_owned()), namespaces })
    }

    /// The one compression of whose ending all files are. A collection can be named like another's file.
    fn guess_compression(&self, folder: &Path) -> Result<Compression> {
        let mut possible = Vec::new();
        for compression in Compression::ALL {
            let mut all = true;
            for Described { database, collection, size, .. } in &self.namespaces {
                let expected = size.is_some_and(|size| size > 0) && left_out(database, collection).is_none();
                all &= !expected || file_of(folder, &format!("{database}.{collection}"), compression)?.is_file();
            }
            if all {
                possible.push(compression);
            }
        }
        match possible.as_slice() {
            [only] => Ok(*only),
            // No file at all: nothing has documents.
            [first, ..] if possible.len() == Compression::ALL.len() => Ok(*first),
            [] => Err(Error::corrupt("files of the backup are missing, or its compression is not known")
                .with_context("path", folder.display())),
            _ => Err(Error::corrupt("how the backup is compressed cannot be told: its .pbm.json says it, two folders up")
                .with_context("path", folder.display())),
        }
    }
}

/// What `<backup>.pbm.json` says.
#[derive(Deserialize)]
struct Outcome {
    #[serde(rename = "type")]
    kind: String,
    status: String,
    compression: String,
}

/// How a backup ended, where that can be told: its folder may have been copied alone.
fn outcome(folder: &Path) -> Result<Option<Outcome>> {
    let whole = folder.canonicalize().map_err(|error| unreadable(folder, error))?;
    let Some(backup) = whole.parent() else { return Ok(None) };
    let (Some(storage), Some(name)) = (backup.parent(), backup.file_name().and_then(|name| name.to_str())) else {
        return Ok(None);
    };
    let path = storage.join(format!("{name}.pbm.json"));
    if !path.is_file() {
        return Ok(None);
    }
    let mut text = String::new();
    Parts::open(&path)?.read_to_string(&mut text).map_err(|error| unreadable(&path, error))?;
    let outcome: Outcome = serde_json::from_str(&text).map_err(|error| {
        Error::corrupt("this does not describe a backup").with_context("file", path.display()).with_source(error)
    })?;
    if outcome.kind != "logical" {
        return Err(Error::new(ErrorKind::Unsupported, "only logical backups can be taken in")
            .with_context("file", path.display())
            .with_context("type", outcome.kind.escape_debug()));
    }
    if outcome.status != "done" {
        return Err(Error::new(ErrorKind::Conflict, "the backup has not ended well, so it is not whole: take in another")
            .with_context("file", path.display())
            .with_context("status", outcome.status.escape_debug()));
    }
    Ok(Some(outcome))
}

impl Outcome {
    fn compression(&self) -> Result<Compression> {
        Ok(match self.compression.as_str() {
            "" | "none" => Compression::None,
            "gzip" | "pgzip" => Compression::Gzip,
            "zstd" => Compression::Zstd,
            "s2" => Compression::S2,
            "snappy" => Compression::Snappy,
            "lz4" => Compression::Lz4,
            other => {
                return Err(Error::new(ErrorKind::Unsupported, "the backup is compressed in a way that is not known here")
                    .with_context("compression", other.escape_debug()));
            }
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
    S2,
    Snappy,
    Lz4,
}

impl Compression {
    const ALL: [Self; 6] = [Self::None, Self::Gzip, Self::Zstd, Self::S2, Self::Snappy, Self::Lz4];

    fn ending(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Gzip => ".gz",
            Self::Zstd => ".zst",
            Self::S2 => ".s2",
            Self::Snappy => ".snappy",
            Self::Lz4 => ".lz4",
        }
    }

    fn open(self, path: &Path) -> Result<Box<dyn Read>> {
        let stored = BufReader::with_capacity(256 << 10, Parts::open(path)?);
        let plain: Box<dyn Read> = match self {
            Self::None => return Ok(Box::new(stored)),
            Self::Gzip => Box::new(MultiGzDecoder::new(stored)),
            Self::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(stored).map_err(|error| unreadable(path, error))?),
            Self::S2 | Self::Snappy => Box::new(s2::Decoder::new(stored)),
            Self::Lz4 => Box::new(lz4_flex::frame::FrameDecoder::new(stored)),
        };
        Ok(Box::new(BufReader::with_capacity(256 << 10, plain)))
    }
}

/// A file and the parts in which it goes on.
struct Parts {
    base: PathBuf,
    open: File,
    part: u32,
}

impl Parts {
    fn open(path: &Path) -> Result<Self> {
        Ok(Self { base: path.to_owned(), open: File::open(path).map_err(|error| unreadable(path, error))?, part: 0 })
    }
}

impl Read for Parts {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            let read = self.open.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            let mut next = self.base.clone().into_os_string();
            next.push(format!(".pbmpart.{}", self.part + 1));
            match File::open(next) {
                Ok(file) => (self.open, self.part) = (file, self.part + 1),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Sums up and counts what it reads.
struct Summed<R> {
    input: R,
    sum: Rc<RefCell<(crc::Digest<'static, u64, crc::Table<16>>, i64)>>,
}

impl<R: Read> Read for Summed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.input.read(buffer)?;
        let mut sum = self.sum.borrow_mut();
        sum.0.update(&buffer[..read]);
        sum.1 = sum.1.saturating_add(i64::try_from(read).unwrap_or(i64::MAX));
        Ok(read)
    }
}

//! mongodump's directories: files of documents, and files that describe collections.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufReader, Read},
    path::{Path, PathBuf},
};

use flate2::read::MultiGzDecoder;
use mongo_core::{
    Error, ErrorKind, Namespace, Result,
    transfer::{catalog::CollectionKind, check_structure},
};

use super::{
    Found, PIECE,
    archive::{Frames, left_out},
    metadata::Metadata,
    names,
};

/// Reads a directory that mongodump has written, compressed or not, handing on what it holds.
///
/// # Errors
/// `NotFound` if there is no such directory, `CorruptData` naming the file that is damaged or truncated; what `found` returns.
pub(super) fn read(root: &Path, found: &mut impl FnMut(Found) -> Result<()>) -> Result<()> {
    if !root.is_dir() {
        return Err(Error::new(ErrorKind::NotFound, "there is no such directory: name the one that mongodump wrote")
            .with_context("path", root.display()));
    }
    found(Found::Server(server_version(root)?))?;
    for file in sorted(root)? {
        let Some(name) = file.file_name().and_then(|name| name.to_str()).map(str::to_owned) else { continue };
        if file.is_dir() {
            read_database(&file, &name, found)?;
        } else if name.starts_with("oplog.bson") {
            found(Found::LeftOut("oplog.bson".to_owned(), left_out("", "oplog").unwrap_or_default().to_owned()))?;
        } else if !name.starts_with("prelude.json") {
            found(Found::LeftOut(name, "is no part of a dump that is known here".to_owned()))?;
        }
    }
    Ok(())
}

/// The files of one collection.
#[derive(Default)]
struct Files {
    metadata: Option<PathBuf>,
    documents: Option<PathBuf>,
}

fn read_database(folder: &Path, database: &str, found: &mut impl FnMut(Found) -> Result<()>) -> Result<()> {
    let mut collections: BTreeMap<String, Files> = BTreeMap::new();
    for file in sorted(folder)? {
        let Some(name) = file.file_name().and_then(|name| name.to_str()).map(str::to_owned) else { continue };
        let plain = name.strip_suffix(".gz").unwrap_or(&name);
        if let Some(stem) = plain.strip_suffix(".metadata.json") {
            collections.entry(stem.to_owned()).or_default().metadata = Some(file);
        } else if let Some(stem) = plain.strip_suffix(".bson").or_else(|| plain.strip_suffix(".bin")) {
            let documents = &mut collections.entry(stem.to_owned()).or_default().documents;
            if documents.is_some() {
                return Err(Error::corrupt("a collection has two files of documents: remove the one that is none of this dump")
                    .with_context("file", file.display()));
            }
            *documents = Some(file);
        } else if !name.starts_with("prelude.json") {
            found(Found::LeftOut(format!("{database}/{name}"), "is no part of a dump that is known here".to_owned()))?;
        }
    }
    // The documents of a time-series collection lie beside its metadata under the name of its buckets.
    let stems: Vec<String> = collections.keys().cloned().collect();
    for stem in stems {
        if let Some(owner) = stem.strip_prefix("system.buckets.")
            && collections.get(owner).is_some_and(|files| files.metadata.is_some() && files.documents.is_none())
            && let Some(buckets) = collections.remove(&stem)
            && let Some(files) = collections.get_mut(owner)
        {
            files.documents = buckets.documents;
        }
    }
    for (stem, files) in collections {
        let metadata = match &files.metadata {
            Some(path) => {
                let mut text = String::new();
                opened(path)?.read_to_string(&mut text).map_err(|error| unreadable(path, error))?;
                Metadata::parse(&text).map_err(|error| error.with_context("file", path.display()))?
            }
            None => Metadata::default(),
        };
        let collection = match &metadata.collection {
            Some(name) => name.clone(),
            None if names::is_cut(&stem) => {
                return Err(Error::corrupt("the name of a collection is cut off, and its metadata does not tell it")
                    .with_context("file", folder.join(&stem).display()));
            }
            None => names::unescape(&stem)?,
        };
        if let Some(reason) = left_out(database, &collection) {
            found(Found::LeftOut(format!("{database}.{collection}"), reason.to_owned()))?;
            continue;
        }
        let namespace = Namespace::new(database, collection)?;
        let entry = metadata.entry(namespace.clone())?;
        let kind = entry.kind();
        found(Found::Collection(entry))?;
        match &files.documents {
            Some(path) => {
                // By its name: the length of a first document can look like the beginning of gzip.
                let gzip = path.extension().is_some_and(|ending| ending == "gz");
                read_documents(path, opened_as(path, gzip)?, &namespace, found)?;
            }
            None if kind == CollectionKind::View => {}
            // mongodump writes a file for every collection, also for an empty one.
            None => {
                return Err(Error::corrupt(
                    "the file with the documents of a collection is missing: the dump was not copied whole",
                )
                .with_context("namespace", namespace));
            }
        }
        found(Found::End(namespace))?;
    }
    Ok(())
}

/// Hands on the documents of a file.
pub(super) fn read_documents(
    path: &Path,
    input: impl Read,
    namespace: &Namespace,
    found: &mut impl FnMut(Found) -> Result<()>,
) -> Result<()> {
    let mut frames = Frames { input };
    let mut piece = Vec::new();
    let named = |error: Error| error.with_context("file", path.display());
    while let Some(document) = frames.document().map_err(named)? {
        check_structure(&document).map_err(named)?;
        piece.extend_from_slice(document.as_bytes());
        if piece.len() >= PIECE {
            found(Found::Documents(namespace.clone(), std::mem::take(&mut piece)))?;
        }
    }
    if piece.is_empty() { Ok(()) } else { found(Found::Documents(namespace.clone(), piece)) }
}

/// `prelude.json` lies in the directory, in its parent if one database was dumped, or is missing.
fn server_version(root: &Path) -> Result<String> {
    for folder in [Some(root), root.parent()].into_iter().flatten() {
        for name in ["prelude.json", "prelude.json.gz"] {
            let path = folder.join(name);
            if !path.is_file() {
                continue;
            }
            let mut text = String::new();
            opened(&path)?.read_to_string(&mut text).map_err(|error| unreadable(&path, error))?;
            let prelude: serde_json::Value = serde_json::from_str(&text).map_err(|error| {
                Error::corrupt("the prelude is no JSON").with_context("file", path.display()).with_source(error)
            })?;
            return Ok(prelude.get("ServerVersion").and_then(|version| version.as_str()).unwrap_or("unknown").to_owned());
        }
    }
    Ok("unknown".to_owned())
}

/// The content of a file that cannot begin like gzip by itself, decompressed if it is compressed.
pub(super) fn opened(path: &Path) -> Result<Box<dyn Read + Send>> {
    let mut file = buffered(path)?;
    // It may be a pipe, which is read only once.
    let gzip = std::io::BufRead::fill_buf(&mut file).map_err(|error| unreadable(path, error))?.starts_with(&[0x1f, 0x8b]);
    Ok(decompressed(file, gzip))
}

fn opened_as(path: &Path, gzip: bool) -> Result<Box<dyn Read + Send>> {
    Ok(decompressed(buffered(path)?, gzip))
}

fn buffered(path: &Path) -> Result<BufReader<File>> {
    let file = File::open(path).map_err(|error| unreadable(path, error))?;
    Ok(BufReader::with_capacity(BUFFER, file))
}

fn decompressed(file: BufReader<File>, gzip: bool) -> Box<dyn Read + Send> {
    if gzip { Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(file))) } else { Box::new(file) }
}

const BUFFER: usize = 256 << 10;

fn sorted(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = || fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>();
    let mut files = read().map_err(|error| unreadable(folder, error))?;
    files.sort();
    Ok(files)
}

pub(super) fn unreadable(path: &Path, error: std::io::Error) -> Error {
    use std::io::ErrorKind as Io;
    let kind = match error.kind() {
        Io::NotFound => ErrorKind::NotFound,
        Io::PermissionDenied => ErrorKind::Unauthorized,
        Io::UnexpectedEof | Io::InvalidData | Io::InvalidInput => ErrorKind::CorruptData,
        _ => ErrorKind::Unavailable,
    };
    Error::new(kind, "a file of the dump cannot be read").with_context("file", path.display()).with_source(error)
}

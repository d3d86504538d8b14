//! Writing a snapshot as mongodump would have written it.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use flate2::{Compression, write::GzEncoder};
use mongo_core::{
    CancellationToken, Error, ErrorKind, Namespace, NamespaceSelection, Result,
    progress::{NoProgress, PhaseMeter, ProgressSink, Total},
    transfer::catalog::{CollectionKind, LeftOut},
};
use serde::Serialize;
use tokio::sync::mpsc;

use super::{
    archive::{Announced, ArchiveWriter, viewless_time_series},
    metadata::Metadata,
    names,
};
use crate::{
    audit::AuditAction,
    repository::{
        Repository, SnapshotChoice, TOOL,
        manifest::{SnapshotId, SnapshotManifest, SnapshotNamespace},
        segment::Content,
    },
    setters::conduct_setters,
};

/// Writes a snapshot in a format of mongodump, for mongorestore and whatever else reads it.
///
/// Documents and definitions are written byte for byte. What these formats cannot hold of a snapshot is its consistency: it is what the
/// snapshot's report says, and no oplog is needed.
///
/// ```no_run
/// # async fn f(repository: mongo_backup::Repository) -> mongo_backup::Result<()> {
/// use mongo_backup::{Export, SnapshotChoice};
///
/// // mongorestore --gzip --archive=shop.archive
/// let report = Export::new(&repository, SnapshotChoice::Latest).gzip(true).to_archive_file("shop.archive").await?;
/// println!("{} documents", report.documents);
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use]
pub struct Export {
    repository: Repository,
    snapshot: SnapshotChoice,
    selection: NamespaceSelection,
    gzip: bool,
    progress: Arc<dyn ProgressSink>,
    cancel: CancellationToken,
}

/// What an export wrote.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct ExportReport {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Collections and views.
    pub namespaces: u64,
    /// Documents.
    pub documents: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What the snapshot does not hold, as its backup said.
    pub left_out: Vec<LeftOut>,
}

/// What is sent to the thread that writes.
enum Piece {
    Open(usize),
    Documents(Vec<bytes::Bytes>),
    Close,
}

impl Export {
    /// Prepares an export of a snapshot.
    pub fn new(repository: &Repository, snapshot: impl Into<SnapshotChoice>) -> Self {
        Self {
            repository: repository.clone(),
            snapshot: snapshot.into(),
            selection: NamespaceSelection::all(),
            gzip: false,
            progress: Arc::new(NoProgress),
            cancel: CancellationToken::new(),
        }
    }

    /// Writes only these namespaces.
    pub fn selection(mut self, selection: NamespaceSelection) -> Self {
        self.selection = selection;
        self
    }

    /// Compresses, as `--gzip` does. Default no.
    pub fn gzip(mut self, gzip: bool) -> Self {
        self.gzip = gzip;
        self
    }

    conduct_setters!("Stops when `token` is cancelled.");

    /// Writes an archive, as `mongodump --archive=path`. The file gets its name when it is complete.
    ///
    /// # Errors
    /// `Conflict` when the file exists, `NotFound` for an unknown snapshot or a pattern that matches nothing, `CorruptData` naming the
    /// pack that is damaged, `Cancelled`, or what writing fails with.
    ///
    /// # Cancel safety
    /// A dropped future leaves at most a file that ends in `.partial`.
    pub async fn to_archive_file(self, path: impl Into<PathBuf>) -> Result<ExportReport> {
        let path = path.into();
        refuse_existing(&path)?;
        let partial = partial(&path);
        let file = File::create(&partial).map_err(|error| unwritable(&partial, error))?;
        let report = self.to_archive(file).await;
        // Syncing takes as long as the disk likes.
        tokio::task::spawn_blocking(move || {
            let finished = report.and_then(|report| {
                let synced = File::open(&partial).and_then(|file| file.sync_all()).and_then(|()| fs::rename(&partial, &path));
                synced.map(|()| report).map_err(|error| unwritable(&path, error))
            });
            if finished.is_err() {
                // It is of no use, and the next attempt writes it anew.
                let _ = fs::remove_file(&partial);
            }
            finished
        })
        .await?
    }

    /// Writes an archive into a stream.
    ///
    /// # Errors
    /// As [`to_archive_file`](Self::to_archive_file).
    ///
    /// # Cancel safety
    /// A dropped future leaves the stream half written.
    #[tracing::instrument(skip_all, name = "export")]
    pub async fn to_archive(self, out: impl Write + Send + 'static) -> Result<ExportReport> {
        let repository = self.repository.clone();
        let subject = [("format", "archive".to_owned()), ("snapshot", format!("{:?}", self.snapshot))];
        repository.recorded(AuditAction::Export, subject, repository.while_reading(self.write_archive_to(out)), |_| None).await
    }

    async fn write_archive_to(self, out: impl Write + Send + 'static) -> Result<ExportReport> {
        let (manifest, namespaces) = self.contents().await?;
        let server = manifest.server_version.clone();
        let gzip = self.gzip;
        self.stream(manifest, namespaces, move |namespaces, pieces| {
            let out = BufWriter::with_capacity(BUFFER, out);
            if gzip {
                let out = write_archive(GzEncoder::new(out, Compression::default()), &server, namespaces, pieces)?;
                out.finish().and_then(|mut out| out.flush()).map_err(broken)
            } else {
                write_archive(out, &server, namespaces, pieces).map(drop)
            }
        })
        .await
    }

    /// Writes a directory, as `mongodump --out=path`. The directory gets its name when it is complete.
    ///
    /// # Errors
    /// As [`to_archive_file`](Self::to_archive_file).
    ///
    /// # Cancel safety
    /// A dropped future leaves at most a directory that ends in `.partial`.
    #[tracing::instrument(skip_all, name = "export")]
    pub async fn to_directory(self, path: impl Into<PathBuf>) -> Result<ExportReport> {
        let repository = self.repository.clone();
        let subject = [("format", "directory".to_owned()), ("snapshot", format!("{:?}", self.snapshot))];
        repository
            .recorded(AuditAction::Export, subject, repository.while_reading(self.write_directory_to(path.into())), |_| None)
            .await
    }

    async fn write_directory_to(self, path: PathBuf) -> Result<ExportReport> {
        refuse_existing(&path)?;
        let partial = partial(&path);
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(|error| unwritable(&partial, error))?;
        }
        let (manifest, namespaces) = self.contents().await?;
        let (server, gzip, root) = (manifest.server_version.clone(), self.gzip, partial.clone());
        let written = self
            .stream(manifest, namespaces, move |namespaces, pieces| write_directory(&root, gzip, &server, namespaces, pieces))
            .await;
        tokio::task::spawn_blocking(move || {
            let finished =
                written.and_then(|report| fs::rename(&partial, &path).map(|()| report).map_err(|error| unwritable(&path, error)));
            if finished.is_err() && partial.exists() {
                let _ = fs::remove_dir_all(&partial);
            }
            finished
        })
        .await?
    }

    async fn contents(&self) -> Result<(SnapshotManifest, Vec<SnapshotNamespace>)> {
        let manifest = self.repository.snapshot(&self.snapshot).await?;
        self.repository.refresh_index().await?;
        let mut namespaces = self.repository.namespaces(&manifest).await?;
        let names = namespaces.iter().map(SnapshotNamespace::namespace);
        if let [first, ..] = self.selection.unmatched(names).as_slice() {
            return Err(Error::new(ErrorKind::NotFound, "nothing in the snapshot matches the pattern: check its spelling")
                .with_context("pattern", first)
                .with_context("snapshot", &manifest.id));
        }
        namespaces.retain(|namespace| self.selection.selects(namespace.namespace()));
        // mongorestore wants to meet users and roles before anything else.
        namespaces.sort_by_key(|namespace| namespace.namespace().database() != "admin");
        Ok((manifest, namespaces))
    }

    /// Reads the documents of the namespaces, one after the other, while a thread writes them.
    async fn stream(
        self,
        manifest: SnapshotManifest,
        namespaces: Vec<SnapshotNamespace>,
        write: impl FnOnce(&[SnapshotNamespace], mpsc::Receiver<Piece>) -> Result<()> + Send + 'static,
    ) -> Result<ExportReport> {
        let mut report = ExportReport {
            snapshot: manifest.id.clone(),
            namespaces: namespaces.len() as u64,
            documents: namespaces.iter().map(SnapshotNamespace::documents).sum(),
            bytes: namespaces.iter().map(SnapshotNamespace::bytes).sum(),
            left_out: manifest.left_out,
        };
        report.left_out.retain(|left_out| !left_out.namespace.is_empty());
        let namespaces = Arc::new(namespaces);
        let (sender, receiver) = mpsc::channel(PIECES);
        let for_writer = Arc::clone(&namespaces);
        // A thread of its own: the runtime may have few for blocking work, and this one waits for others of them.
        let (ended, writing) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            // Nobody listens when the export was dropped.
            let _ = ended.send(write(&for_writer, receiver));
        });
        let meter = PhaseMeter::start(Arc::clone(&self.progress), "export", Total::exact(report.documents, report.bytes));
        let read = self.read(&namespaces, sender, &meter).await;
        let written = writing.await.map_err(|error| Error::internal("the writer of the export has died").with_source(error))?;
        match read {
            // The writer has gone away, and knows why.
            Err(error) if error.kind() == ErrorKind::Cancelled && !self.cancel.is_cancelled() => written?,
            Err(error) => return Err(error),
            Ok(()) => written?,
        }
        meter.finish();
        Ok(report)
    }

    async fn read(&self, namespaces: &[SnapshotNamespace], sender: mpsc::Sender<Piece>, meter: &PhaseMeter) -> Result<()> {
        let send = async |piece| sender.send(piece).await.map_err(|_| Error::cancelled());
        for (position, namespace) in namespaces.iter().enumerate() {
            send(Piece::Open(position)).await?;
            let mut walk = self.repository.walk(&namespace.root)?;
            let mut group = Vec::new();
            loop {
                if self.cancel.is_cancelled() {
                    return Err(Error::cancelled());
                }
                let entry = walk.next().await?;
                let ended = entry.is_none();
                group.extend(entry);
                if group.len() >= SEGMENTS_AT_ONCE || ended && !group.is_empty() {
                    let ids: Vec<_> = group.iter().map(|entry| entry.id).collect();
                    let segments = self.repository.read_segments(Content::Documents, &ids).await?;
                    let sum = |of: fn(&crate::repository::tree::TreeEntry) -> u64| group.iter().map(of).sum::<u64>();
                    if segments.iter().map(|segment| segment.len() as u64).sum::<u64>() != sum(|entry| entry.bytes) {
                        return Err(Error::corrupt("a segment does not hold what its tree says")
                            .with_context("namespace", namespace.namespace()));
                    }
                    let (documents, bytes) = (sum(|entry| entry.documents), sum(|entry| entry.bytes));
                    send(Piece::Documents(segments)).await?;
                    meter.advance(documents, bytes);
                    group.clear();
                }
                if ended {
                    break;
                }
            }
            send(Piece::Close).await?;
        }
        Ok(())
    }
}

fn write_archive<W: Write>(
    out: W,
    server: &str,
    namespaces: &[SnapshotNamespace],
    mut pieces: mpsc::Receiver<Piece>,
) -> Result<W> {
    let announced = namespaces
        .iter()
        .map(|namespace| {
            let metadata = Metadata::of(namespace.entry())?;
            let kind = match namespace.kind() {
                CollectionKind::TimeSeries => "timeseries",
                CollectionKind::View => "view",
                _ => "collection",
            };
            Ok(Announced { namespace: namespace.namespace(), metadata: metadata.to_text(), bytes: namespace.bytes(), kind })
        })
        .collect::<Result<Vec<_>>>()?;
    let mut archive = ArchiveWriter::begin(out, server, TOOL, &announced).map_err(broken)?;
    while let Some(piece) = pieces.blocking_recv() {
        let Piece::Open(position) = piece else { return Err(Error::internal("documents of no collection")) };
        let namespace = namespaces.get(position).ok_or_else(|| Error::internal("documents of no collection"))?;
        let mut collection = archive.open(&data_namespace(namespace, server)?).map_err(broken)?;
        loop {
            match pieces.blocking_recv() {
                Some(Piece::Documents(segments)) => {
                    for segment in segments {
                        collection.write(&segment).map_err(broken)?;
                    }
                }
                Some(Piece::Close) => break,
                // The reader has failed, and tells why.
                _ => return Err(Error::cancelled()),
            }
        }
        collection.close().map_err(broken)?;
    }
    archive.finish().map_err(broken)
}

fn write_directory(
    root: &Path,
    gzip: bool,
    server: &str,
    namespaces: &[SnapshotNamespace],
    mut pieces: mpsc::Receiver<Piece>,
) -> Result<()> {
    fs::create_dir_all(root).map_err(|error| unwritable(root, error))?;
    let prelude = serde_json::json!({ "ServerVersion": server, "ToolVersion": TOOL });
    OutputFile::create(root, "prelude.json", gzip)?.finish_with(prelude.to_string().as_bytes())?;
    while let Some(piece) = pieces.blocking_recv() {
        let Piece::Open(position) = piece else { return Err(Error::internal("documents of no collection")) };
        let namespace = namespaces.get(position).ok_or_else(|| Error::internal("documents of no collection"))?;
        let folder = root.join(namespace.namespace().database());
        fs::create_dir_all(&folder).map_err(|error| unwritable(&folder, error))?;
        let metadata = Metadata::of(namespace.entry())?.to_text();
        let stem = names::escape(namespace.namespace().collection());
        OutputFile::create(&folder, &format!("{stem}.metadata.json"), gzip)?.finish_with(metadata.as_bytes())?;
        let mut file = match namespace.kind() {
            CollectionKind::View => None,
            _ => {
                let stem = names::escape(data_namespace(namespace, server)?.collection());
                Some(OutputFile::create(&folder, &format!("{stem}.bson"), gzip)?)
            }
        };
        loop {
            match (pieces.blocking_recv(), &mut file) {
                (Some(Piece::Documents(segments)), Some(file)) => {
                    for segment in segments {
                        file.write(&segment)?;
                    }
                }
                (Some(Piece::Close), _) => break,
                _ => return Err(Error::cancelled()),
            }
        }
        if let Some(file) = file {
            file.finish_with(&[])?;
        }
    }
    Ok(())
}

/// The name under which the documents of a collection travel.
fn data_namespace(namespace: &SnapshotNamespace, server: &str) -> Result<Namespace> {
    let name = namespace.namespace();
    match namespace.kind() {
        CollectionKind::TimeSeries if viewless_time_series(server) => Ok(name.clone()),
        kind => Ok(kind.data_namespace(name)?.unwrap_or_else(|| name.clone())),
    }
}

/// A file of a dump, compressed or not.
struct OutputFile {
    path: PathBuf,
    out: Output,
}

enum Output {
    Plain(BufWriter<File>),
    Gzip(GzEncoder<BufWriter<File>>),
}

impl OutputFile {
    fn create(folder: &Path, name: &str, gzip: bool) -> Result<Self> {
        let path = folder.join(if gzip { format!("{name}.gz") } else { name.to_owned() });
        let file = File::create_new(&path).map_err(|error| unwritable(&path, error))?;
        let file = BufWriter::with_capacity(BUFFER, file);
        let out = if gzip { Output::Gzip(GzEncoder::new(file, Compression::default())) } else { Output::Plain(file) };
        Ok(Self { path, out })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = match &mut self.out {
            Output::Plain(out) => out.write_all(bytes),
            Output::Gzip(out) => out.write_all(bytes),
        };
        written.map_err(|error| unwritable(&self.path, error))
    }

    fn finish_with(mut self, bytes: &[u8]) -> Result<()> {
        self.write(bytes)?;
        let path = self.path;
        let synced = match self.out {
            Output::Plain(out) => out.into_inner().map_err(std::io::IntoInnerError::into_error),
            Output::Gzip(out) => out.finish().and_then(|out| out.into_inner().map_err(std::io::IntoInnerError::into_error)),
        };
        synced.and_then(|file| file.sync_all()).map_err(|error| unwritable(&path, error))
    }
}

fn refuse_existing(path: &Path) -> Result<()> {
    if path.exists() {
        return Err(Error::new(ErrorKind::Conflict, "there is something already: name another place, or remove it")
            .with_context("path", path.display()));
    }
    Ok(())
}

fn partial(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    path.with_file_name(name)
}

fn unwritable(path: &Path, error: std::io::Error) -> Error {
    broken(error).with_context("path", path.display())
}

fn broken(error: std::io::Error) -> Error {
    use std::io::ErrorKind as Io;
    let (kind, what) = match error.kind() {
        Io::PermissionDenied | Io::ReadOnlyFilesystem => {
            (ErrorKind::Unauthorized, "the export may not be written there: choose another place")
        }
        Io::StorageFull | Io::QuotaExceeded => (ErrorKind::Unavailable, "the disk is full: make room and run again"),
        Io::NotFound => (ErrorKind::NotFound, "the export's folder does not exist: make it, or choose another"),
        Io::BrokenPipe => (ErrorKind::Unavailable, "whoever reads the export has stopped"),
        _ => (ErrorKind::Unavailable, "the export cannot be written"),
    };
    Error::new(kind, what).with_source(error)
}

const BUFFER: usize = 256 << 10;
const PIECES: usize = 4;
const SEGMENTS_AT_ONCE: usize = 16;

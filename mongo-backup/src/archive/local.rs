//! An archive in a folder of a local or network filesystem.

use std::{
    fs::{self, File},
    io::{self, ErrorKind as Io, Read as _, Seek as _, SeekFrom},
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use mongo_core::{Error, ErrorKind, Result};

use super::{ArchiveSink, ObjectMeta, ObjectName, PutMode, PutOutcome, not_found, past_the_end, uncached::write_synced};

/// Keeps each object in a file of its own below a folder.
///
/// A `put` writes a temporary file in `.tmp` of the folder, syncs it to the disk, gives it its name by a link (which fails
/// if the name is taken) or, to replace, by a rename, and syncs the folder. So a crash leaves either no object or the
/// whole object, and at worst a temporary file. The folder is created by the first `put`.
///
/// The filesystem must support hard links, or, on Linux, renaming that does not replace. Otherwise create-only falls back to a look before the rename, which two
/// writers of the very same name can pass at the same time.
#[derive(Clone, Debug)]
pub struct LocalArchive {
    root: Arc<PathBuf>,
}

impl LocalArchive {
    /// An archive below `root`. Nothing is read or written yet.
    ///
    /// # Errors
    /// `InvalidInput` when `root` exists and is no folder.
    pub fn new(root: impl Into<PathBuf>) -> Result<Self> {
        let root = root.into();
        if root.as_os_str().is_empty() {
            return Err(Error::invalid("the archive's path is empty"));
        }
        match fs::metadata(&root) {
            Ok(metadata) if !metadata.is_dir() => {
                Err(Error::invalid("the archive's path is a file: name a folder").with_context("path", root.display()))
            }
            _ => Ok(Self { root: Arc::new(root) }),
        }
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, name: &ObjectName) -> PathBuf {
        self.root.join(name.as_str())
    }

    fn put_file(&self, name: &ObjectName, bytes: &[u8], mode: PutMode) -> Result<PutOutcome> {
        let target = self.path(name);
        if mode == PutMode::CreateOnly && target.exists() {
            return Ok(PutOutcome::AlreadyExists);
        }
        let temporary_folder = self.root.join(TEMPORARY);
        let parent = target.parent().unwrap_or(&self.root).to_owned();
        let create = |folder: &Path| fs::create_dir_all(folder).map_err(|error| wrong("cannot create a folder", folder, error));
        create(&temporary_folder)?;
        create(&parent)?;
        let temporary = temporary_folder.join(unique_name()?);
        let outcome = write_synced(&temporary, bytes)
            .map_err(|error| wrong("cannot write", &temporary, error))
            .and_then(|()| give_name(&temporary, &target, mode).map_err(|error| wrong("cannot write", &target, error)));
        // After a link the temporary name is a second one for the object; after a failure it is a leftover.
        let removed = fs::remove_file(&temporary);
        let outcome = outcome?;
        if let Err(error) = removed
            && error.kind() != Io::NotFound
        {
            return Err(wrong("cannot remove a temporary file", &temporary, error));
        }
        if outcome == PutOutcome::Stored {
            // The names themselves must survive a power cut, up to the root.
            let mut folder = parent.as_path();
            loop {
                sync_folder(folder).map_err(|error| wrong("cannot sync the folder", folder, error))?;
                if folder == self.root.as_path() {
                    break;
                }
                folder = folder.parent().unwrap_or(&self.root);
            }
        }
        Ok(outcome)
    }

    fn get_file(&self, name: &ObjectName, range: Option<Range<u64>>) -> Result<Bytes> {
        let path = self.path(name);
        let failed = |error: io::Error| match error.kind() {
            Io::NotFound | Io::NotADirectory => not_found(name),
            _ => wrong("cannot read", &path, error),
        };
        let mut file = File::open(&path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        let range = range.unwrap_or(0..size);
        if range.end > size || range.start > range.end {
            return Err(past_the_end(name, range.end, size));
        }
        let length = usize::try_from(range.end - range.start)
            .map_err(|error| Error::corrupt("an object is too large").with_context("object", name).with_source(error))?;
        file.seek(SeekFrom::Start(range.start)).map_err(failed)?;
        let mut bytes = vec![0; length];
        file.read_exact(&mut bytes).map_err(failed)?;
        Ok(bytes.into())
    }

    fn list_files(&self, prefix: &str) -> Result<Vec<ObjectMeta>> {
        let mut found = Vec::new();
        let mut folders = vec![self.root.join(prefix)];
        while let Some(folder) = folders.pop() {
            let entries = match fs::read_dir(&folder) {
                Ok(entries) => entries,
                // A link to a place that is not mounted is no empty folder.
                Err(error) if matches!(error.kind(), Io::NotFound | Io::NotADirectory) && !is_link(&folder) => continue,
                Err(error) => return Err(wrong("cannot list", &folder, error)),
            };
            for entry in entries {
                let entry = entry.map_err(|error| wrong("cannot list", &folder, error))?;
                let path = entry.path();
                // Symbolic links are followed: an operator may have moved a part of the archive.
                let metadata = match fs::metadata(&path) {
                    Ok(metadata) => metadata,
                    // Deleted between the listing and the look.
                    Err(error) if error.kind() == Io::NotFound && !is_link(&path) => continue,
                    Err(error) => return Err(wrong("cannot look at", &path, error)),
                };
                let Some(name) = path.strip_prefix(self.root.as_path()).ok().and_then(Path::to_str) else { continue };
                if metadata.is_dir() {
                    if name != TEMPORARY {
                        folders.push(path);
                    }
                } else if let Ok(name) = ObjectName::new(name.replace(std::path::MAIN_SEPARATOR, "/")) {
                    found.push(ObjectMeta::new(name, metadata.len()));
                } else {
                    // Foreign files do no harm, but whoever asks whether the folder is empty must hear of them.
                    found.push(ObjectMeta::new(ObjectName::new("foreign-file")?, metadata.len()));
                }
            }
        }
        Ok(found)
    }
}

#[async_trait]
impl ArchiveSink for LocalArchive {
    fn describe(&self) -> String {
        format!("folder {}", self.root.display())
    }

    async fn put(&self, name: &ObjectName, bytes: Bytes, mode: PutMode) -> Result<PutOutcome> {
        let (this, name) = (self.clone(), name.clone());
        tokio::task::spawn_blocking(move || this.put_file(&name, &bytes, mode)).await?
    }

    async fn get(&self, name: &ObjectName, range: Option<Range<u64>>) -> Result<Bytes> {
        let (this, name) = (self.clone(), name.clone());
        tokio::task::spawn_blocking(move || this.get_file(&name, range)).await?
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<ObjectMeta>> {
        let (this, prefix) = (self.clone(), prefix.to_owned());
        stream::once(async move { tokio::task::spawn_blocking(move || this.list_files(&prefix)).await.map_err(Error::from)? })
            .flat_map(|listed| match listed {
                Ok(found) => stream::iter(found.into_iter().map(Ok).collect::<Vec<_>>()),
                Err(error) => stream::iter(vec![Err(error)]),
            })
            .boxed()
    }

    /// Zero. A network filesystem may cache listings: give the prune a [lag](crate::Prune::listing_lag) there.
    fn listing_lag(&self) -> Duration {
        Duration::ZERO
    }

    async fn delete(&self, name: &ObjectName) -> Result<()> {
        let path = self.path(name);
        tokio::task::spawn_blocking(move || match fs::remove_file(&path) {
            Err(error) if error.kind() != Io::NotFound => Err(wrong("cannot delete", &path, error)),
            _ => Ok(()),
        })
        .await?
    }

    async fn head(&self, name: &ObjectName) -> Result<ObjectMeta> {
        let path = self.path(name);
        let name = name.clone();
        tokio::task::spawn_blocking(move || match fs::metadata(&path) {
            Ok(metadata) => Ok(ObjectMeta::new(name, metadata.len())),
            Err(error) if matches!(error.kind(), Io::NotFound | Io::NotADirectory) => Err(not_found(&name)),
            Err(error) => Err(wrong("cannot look at", &path, error)),
        })
        .await?
    }
}

fn give_name(temporary: &Path, target: &Path, mode: PutMode) -> io::Result<PutOutcome> {
    match mode {
        PutMode::Replace => fs::rename(temporary, target)?,
        PutMode::CreateOnly => match fs::hard_link(temporary, target) {
            Ok(()) => {}
            Err(error) if error.kind() == Io::AlreadyExists => return Ok(PutOutcome::AlreadyExists),
            Err(error) if matches!(error.kind(), Io::Unsupported | Io::PermissionDenied) => {
                // A filesystem without hard links (FAT, some network filesystems) answers EPERM or EOPNOTSUPP.
                if let Some(renamed) = rename_new(temporary, target) {
                    return renamed;
                }
                if target.exists() {
                    return Ok(PutOutcome::AlreadyExists);
                }
                fs::rename(temporary, target)?;
            }
            Err(error) => return Err(error),
        },
    }
    Ok(PutOutcome::Stored)
}

fn is_link(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink())
}

/// Renames unless the name is taken; none where the system cannot.
#[cfg(target_os = "linux")]
fn rename_new(temporary: &Path, target: &Path) -> Option<io::Result<PutOutcome>> {
    use rustix::{
        fs::{CWD, RenameFlags, renameat_with},
        io::Errno,
    };
    match renameat_with(CWD, temporary, CWD, target, RenameFlags::NOREPLACE) {
        Ok(()) => Some(Ok(PutOutcome::Stored)),
        Err(Errno::EXIST) => Some(Ok(PutOutcome::AlreadyExists)),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => None,
        Err(error) => Some(Err(error.into())),
    }
}

#[cfg(not(target_os = "linux"))]
fn rename_new(_: &Path, _: &Path) -> Option<io::Result<PutOutcome>> {
    None
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    // A folder can be opened and synced on Unix only; elsewhere the filesystem orders names by itself.
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

fn unique_name() -> Result<String> {
    let mut random = [0; 12];
    getrandom::fill(&mut random)
        .map_err(|error| Error::internal("no randomness to be had").with_source(io::Error::other(error.to_string())))?;
    Ok(hex::encode(random))
}

fn wrong(what: &'static str, path: &Path, error: io::Error) -> Error {
    let kind = match error.kind() {
        Io::NotFound | Io::NotADirectory => ErrorKind::NotFound,
        Io::PermissionDenied | Io::ReadOnlyFilesystem => ErrorKind::Unauthorized,
        Io::StorageFull | Io::QuotaExceeded => ErrorKind::Unavailable,
        _ => ErrorKind::Unavailable,
    };
    let cure = match error.kind() {
        Io::PermissionDenied => ": grant the right to write there, or choose another archive",
        Io::ReadOnlyFilesystem => ": the filesystem is read-only, choose another archive",
        Io::StorageFull | Io::QuotaExceeded => ": the disk is full, make room and run again",
        _ => "",
    };
    Error::new(kind, format!("{what} {}{cure}", path.display())).with_source(error)
}

const TEMPORARY: &str = ".tmp";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::conformance;

    #[tokio::test]
    async fn conforms() {
        let folder = tempfile::tempdir().unwrap();
        let archive = LocalArchive::new(folder.path().join("new/deep")).unwrap();
        conformance::check(Arc::new(archive)).await.unwrap();
    }

    #[tokio::test]
    async fn leaves_no_temporary_files() {
        let folder = tempfile::tempdir().unwrap();
        let archive = LocalArchive::new(folder.path()).unwrap();
        let name = ObjectName::new("a/b").unwrap();
        for mode in [PutMode::CreateOnly, PutMode::CreateOnly, PutMode::Replace] {
            archive.put(&name, Bytes::from_static(b"x"), mode).await.unwrap();
        }
        assert_eq!(fs::read_dir(folder.path().join(TEMPORARY)).unwrap().count(), 0);
    }

    #[test]
    fn a_file_is_no_archive() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = LocalArchive::new(file.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}

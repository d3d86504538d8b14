//! States in the files of a folder.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;

use super::{StateName, StateStore, check_size};
use crate::error::{Error, ErrorKind, Result};

/// Keeps each state in a file of a folder, which the first save makes.
///
/// A file is written under a temporary name, synced to the disk and renamed, and begins with a BLAKE3 sum of what it
/// holds. A process that is killed in the midst of it can leave the temporary file, whose name begins with a dot.
#[derive(Clone, Debug)]
pub struct FileState {
    folder: Arc<PathBuf>,
}

impl FileState {
    /// States in `folder`. Nothing is read or written yet.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: Arc::new(folder.into()) }
    }

    fn path(&self, name: &StateName) -> PathBuf {
        self.folder.join(name.as_str())
    }

    fn read(&self, name: &StateName) -> Result<Option<Vec<u8>>> {
        let path = self.path(name);
        let stored = match fs::read(&path) {
            Ok(stored) => stored,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("cannot read", &path, error)),
        };
        match stored.split_first_chunk::<32>() {
            Some((sum, state)) if blake3::hash(state) == *sum => Ok(Some(state.to_vec())),
            _ => Err(Error::corrupt("a state is not what was saved: the file is damaged").with_context("path", path.display())),
        }
    }

    fn write(&self, name: &StateName, state: &[u8]) -> Result<()> {
        let folder = &self.folder;
        make_folder(folder).map_err(|error| failed("cannot make the folder", folder, error))?;
        let temporary = folder.join(format!(".{name}.{:016x}", fastrand::u64(..)));
        let written = (|| {
            let mut file = File::create_new(&temporary)?;
            file.write_all(blake3::hash(state).as_bytes())?;
            file.write_all(state)?;
            file.sync_all()?;
            fs::rename(&temporary, self.path(name))?;
            sync_folder(folder)
        })();
        written.map_err(|error| {
            // Gone already if it was renamed; and if it cannot be removed, the first error says why.
            let _ = fs::remove_file(&temporary);
            failed("cannot write", &self.path(name), error)
        })
    }

    fn delete(&self, name: &StateName) -> Result<()> {
        let path = self.path(name);
        match fs::remove_file(&path).and_then(|()| sync_folder(&self.folder)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("cannot remove", &path, error)),
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl StateStore for FileState {
    fn describe(&self) -> String {
        format!("folder {}", self.folder.display())
    }

    async fn load(&self, name: &StateName) -> Result<Option<Vec<u8>>> {
        let (this, name) = (self.clone(), name.clone());
        tokio::task::spawn_blocking(move || this.read(&name)).await?
    }

    async fn save(&self, name: &StateName, state: Vec<u8>) -> Result<()> {
        check_size(name, &state)?;
        let (this, name) = (self.clone(), name.clone());
        tokio::task::spawn_blocking(move || this.write(&name, &state)).await?
    }

    async fn remove(&self, name: &StateName) -> Result<()> {
        let (this, name) = (self.clone(), name.clone());
        tokio::task::spawn_blocking(move || this.delete(&name)).await?
    }
}

/// Makes a folder and those above it, each so that it survives a power cut.
fn make_folder(folder: &Path) -> io::Result<()> {
    if folder.as_os_str().is_empty() || folder.is_dir() {
        return Ok(());
    }
    let above = folder.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_folder(above)?;
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => sync_folder(above),
    }
}

/// The name itself must survive a power cut.
#[cfg(unix)]
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Elsewhere folders cannot be synced.
#[cfg(not(unix))]
fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

fn failed(what: &str, path: &Path, error: io::Error) -> Error {
    Error::new(ErrorKind::Unavailable, what.to_owned()).with_context("path", path.display()).with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::conformance;

    #[tokio::test]
    async fn conforms() {
        let folder = tempfile::tempdir().unwrap();
        conformance::check(&FileState::new(folder.path().join("made/anew"))).await.unwrap();
    }

    #[tokio::test]
    async fn a_damaged_file_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let (states, name) = (FileState::new(folder.path()), "some".parse().unwrap());
        states.save(&name, b"how far it is".to_vec()).await.unwrap();
        let path = folder.path().join("some");
        let whole = fs::read(&path).unwrap();
        for position in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[position] ^= 1;
            fs::write(&path, &flipped).unwrap();
            assert_eq!(states.load(&name).await.unwrap_err().kind(), ErrorKind::CorruptData);
            fs::write(&path, &whole[..position]).unwrap();
            assert_eq!(states.load(&name).await.unwrap_err().kind(), ErrorKind::CorruptData);
        }
    }
}

//! Writing large files past the page cache.
//!
//! A backup is written once and hardly read soon: in the page cache it would only drive out what the host needs there. And
//! it is cheaper, for the kernel neither copies the bytes nor looks for free pages: a tenth of the work of a whole backup.

use std::{
    fs::File,
    io::{self, Write as _},
    path::Path,
};

/// Makes a new file of these bytes that survives a power cut. Its name does so only once its folder is synced too.
pub(super) fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    if bytes.len() < WORTHWHILE || !write_direct(path, bytes)? {
        file.write_all(bytes)?;
    }
    file.set_len(bytes.len() as u64)?;
    file.sync_all()
}

/// Writes the bytes, and up to a block of zeros behind them, past the page cache; or says that this cannot be done here.
#[cfg(target_os = "linux")]
fn write_direct(path: &Path, bytes: &[u8]) -> io::Result<bool> {
    use std::{fs::OpenOptions, os::unix::fs::OpenOptionsExt as _};

    use rustix::{fs::OFlags, io::Errno};

    // Filesystems without direct writes answer EINVAL to the opening or to a write; so do devices with larger blocks, and be
    // it to the last write. Whatever was written until then is written once more.
    let refused = |error: &io::Error| error.raw_os_error() == Some(Errno::INVAL.raw_os_error());
    let mut file = match OpenOptions::new().write(true).custom_flags(OFlags::DIRECT.bits().cast_signed()).open(path) {
        Ok(file) => file,
        Err(error) if refused(&error) => return Ok(false),
        Err(error) => return Err(error),
    };
    // The kernel reads directly from memory that begins at a block and is a number of blocks long.
    let mut memory = vec![0; PIECE + BLOCK];
    let start = memory.as_ptr().align_offset(BLOCK);
    let Some(buffer) = memory.get_mut(start..start.saturating_add(PIECE)) else { return Ok(false) };
    for piece in bytes.chunks(PIECE) {
        buffer[..piece.len()].copy_from_slice(piece);
        let padded = piece.len().next_multiple_of(BLOCK);
        buffer[piece.len()..padded].fill(0);
        match file.write_all(&buffer[..padded]) {
            Ok(()) => {}
            Err(error) if refused(&error) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

#[cfg(not(target_os = "linux"))]
fn write_direct(_: &Path, _: &[u8]) -> io::Result<bool> {
    Ok(false)
}

/// Below this the page cache costs less than an extra request to the disk.
const WORTHWHILE: usize = 256 << 10;
#[cfg(target_os = "linux")]
const PIECE: usize = 1 << 20;
#[cfg(target_os = "linux")]
const BLOCK: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_every_length_hold_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        for length in [0, 1, 4096, WORTHWHILE - 1, WORTHWHILE, WORTHWHILE + 1, 1 << 20, (1 << 20) + 4095, (3 << 20) + 17] {
            let bytes: Vec<u8> = (0..length).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect();
            let path = folder.path().join(length.to_string());
            write_synced(&path, &bytes).unwrap();
            assert!(std::fs::read(&path).unwrap() == bytes, "{length}");
        }
    }

    #[test]
    fn a_file_that_exists_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, "before").unwrap();
        assert_eq!(write_synced(&path, &[1; 1 << 20]).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"before");
    }

    /// A filesystem in memory refuses or grants direct writes by the kernel's version; either way the bytes arrive.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_filesystem_in_memory_takes_them_too() {
        let Ok(folder) = tempfile::tempdir_in("/dev/shm") else { return };
        let path = folder.path().join("a");
        write_synced(&path, &[7; (1 << 20) + 5]).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), vec![7; (1 << 20) + 5]);
    }
}

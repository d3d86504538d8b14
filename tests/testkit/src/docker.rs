//! Servers in containers.
//!
//! `testcontainers` creates and starts them; everything after that goes through the `docker` command, which can do it
//! while a thread panics, from a destructor and from the watchdog, where no runtime lives.

use std::{
    env, fmt,
    os::unix::process::CommandExt as _,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use testcontainers::{
    ContainerRequest, CopyTargetOptions, GenericImage, ImageExt as _, core::IntoContainerPort as _, runners::AsyncRunner as _,
};
use tokio::time::{Instant, sleep};

use crate::{
    Error, Result,
    access::Login,
    error::report,
    runtime,
    server::{Plan, START_LIMIT, Surroundings, free_port, reason, tail},
};

/// An image that is on this machine.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    name: String,
    tag: String,
}

impl Image {
    fn parse(image: &str) -> Self {
        // A colon before the last slash belongs to the registry's port.
        match image.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => Self { name: name.to_owned(), tag: tag.to_owned() },
            _ => Self { name: image.to_owned(), tag: "latest".to_owned() },
        }
    }

    fn is_here(&self) -> bool {
        docker(["image", "inspect", "--format", "{{.Id}}", &self.to_string()]).is_ok()
    }

    /// Pulls it unless it is here.
    fn bring(&self) -> Result<()> {
        if self.is_here() {
            return Ok(());
        }
        docker(["pull", "--quiet", &self.to_string()]).map(|_| ())
    }
}

impl fmt::Display for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, self.tag)
    }
}

/// The image for `version`: the one that `MONGO_TESTKIT_IMAGE` names, or else the official one, or where that cannot
/// be pulled the one that `build-image.sh` makes. Blocks.
pub(crate) fn find(version: Option<&str>) -> Result<Image> {
    docker(["version", "--format", "{{.Server.Version}}"])?;
    if let Some(named) = env::var_os("MONGO_TESTKIT_IMAGE").filter(|named| !named.is_empty()) {
        let image = Image::parse(&named.to_string_lossy());
        return match image.bring() {
            Ok(()) => Ok(image),
            Err(error) => Err(Error::Invalid(format!("the image {image} of MONGO_TESTKIT_IMAGE cannot be had: {error}"))),
        };
    }
    let official = Image::parse(&format!("mongo:{}", version.unwrap_or("7.0")));
    let Err(error) = official.bring() else { return Ok(official) };
    let local = Image::parse(LOCAL_IMAGE);
    if local.is_here() {
        tracing::warn!(%error, %official, %local, "the official image cannot be pulled, so the local one it is");
        return Ok(local);
    }
    Err(Error::NoServer(format!(
        "the image {official} cannot be pulled ({error}): tests/testkit/docker/build-image.sh builds one without pulling, \
         and MONGO_TESTKIT_IMAGE can name another"
    )))
}

/// A container with one server; dropping it removes it.
#[derive(Debug)]
pub(crate) struct Container {
    plan: Arc<Plan>,
    index: usize,
    name: String,
    port: u16,
    paused: AtomicBool,
}

impl Container {
    pub(crate) async fn start(plan: Arc<Plan>, image: Image, index: usize) -> Result<Self> {
        for _ in 0..PORT_ATTEMPTS {
            let port = free_port()?;
            let folder = plan.folder.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
            let name = format!("{folder}-{index}-{port}");
            let container = Self { plan: Arc::clone(&plan), index, name: name.clone(), port, paused: AtomicBool::new(false) };
            plan.watchdog.set(index, Some(name));
            let request = container.request(&image);
            let started = runtime::background()?.spawn(async move { request.start().await }).await;
            match started {
                // From here on the container belongs to `Container`. Its own handle would remove it when dropped, but
                // only in a living runtime, and panics without one.
                Ok(Ok(handle)) => std::mem::forget(handle),
                Ok(Err(error)) => {
                    let error = report(&error);
                    if ["port is already allocated", "address already in use"].iter().any(|taken| error.contains(taken)) {
                        continue;
                    }
                    return Err(Error::Server(format!("a container of {image} does not start: {error}")));
                }
                Err(error) => return Err(Error::Server(format!("the start of a container was broken off: {error}"))),
            }
            match container.wait_until_listening(0).await {
                Ok(()) => return Ok(container),
                Err(Error::Server(problem)) if problem.contains("Address already in use") => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::Server(format!("{PORT_ATTEMPTS} ports in a row were taken by others before mongod could listen")))
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn is_running(&self) -> bool {
        self.inspect("{{.State.Running}}").is_some_and(|running| running == "true")
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    pub(crate) async fn start_again(&self) -> Result<()> {
        let before = self.starts();
        docker(["start", &self.name])?;
        self.wait_until_listening(before).await
    }

    pub(crate) fn kill(&self) -> Result<()> {
        if self.is_paused() {
            // Docker does not kill what is frozen.
            self.resume()?;
        }
        match docker(["kill", "--signal", "KILL", &self.name]) {
            Err(error) if error.to_string().contains("is not running") => return Ok(()),
            killed => killed?,
        };
        docker(["wait", &self.name]).map(|_| ())
    }

    pub(crate) fn terminate(&self) -> Result<()> {
        docker(["kill", "--signal", "TERM", &self.name]).map(|_| ())
    }

    pub(crate) fn pause(&self) -> Result<()> {
        docker(["pause", &self.name])?;
        self.paused.store(true, Ordering::SeqCst);
        Ok(())
    }

    pub(crate) fn resume(&self) -> Result<()> {
        docker(["unpause", &self.name])?;
        self.paused.store(false, Ordering::SeqCst);
        Ok(())
    }

    pub(crate) fn log_tail(&self, lines: usize) -> String {
        tail(&self.log(), lines)
    }

    /// The container to be: a mongod on `port`, inside and outside.
    fn request(&self, image: &Image) -> ContainerRequest<GenericImage> {
        // Members must reach each other, and themselves, under the addresses that clients use, and the exception that
        // lets the first user in is for connections from the same machine: both want the host's own network. A single
        // server does with a published port, which also works where Docker runs in a machine of its own.
        let host_network = self.plan.members > 1 || self.plan.login != Login::No || self.plan.fault_proxies;
        let surroundings = Surroundings {
            data: DATA.to_owned(),
            key_file: KEY_FILE.to_owned(),
            server_pem: SERVER_PEM.to_owned(),
            ca: CA.to_owned(),
            bind: if host_network { "127.0.0.1" } else { "0.0.0.0" },
        };
        let mut request = GenericImage::new(image.name.as_str(), image.tag.as_str())
            // The official image's own entry point would change to a user who cannot read our files.
            .with_entrypoint("mongod")
            .with_container_name(&self.name)
            .with_cmd(self.plan.arguments(&surroundings, self.port))
            .with_startup_timeout(START_LIMIT);
        request = if host_network {
            request.with_network("host")
        } else {
            request.with_mapped_port(self.port, self.port.tcp()).with_host_config_modifier(|host| {
                // Published for this machine only.
                let bindings = host.port_bindings.iter_mut().flat_map(|ports| ports.values_mut()).flatten().flatten();
                bindings.for_each(|binding| binding.host_ip = Some("127.0.0.1".to_owned()));
            })
        };
        let files = [
            (KEY_FILE, self.plan.key_file.as_ref()),
            (SERVER_PEM, self.plan.tls.as_ref().map(|tls| &tls.server)),
            (CA, self.plan.tls.as_ref().map(|tls| &tls.ca)),
        ];
        for (inside, outside) in files {
            if let Some(outside) = outside {
                request = request.with_copy_to(CopyTargetOptions::new(inside).with_mode(0o400), outside.clone());
            }
        }
        request
    }

    fn inspect(&self, format: &str) -> Option<String> {
        docker(["inspect", "--format", format, &self.name]).ok()
    }

    fn log(&self) -> String {
        let Ok(output) = command(["logs", &self.name]).output() else { return String::new() };
        // What a server says before it has a log goes to its standard error.
        [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat()
    }

    /// How often the server has begun to listen.
    fn starts(&self) -> usize {
        self.log().matches("aiting for connections").count()
    }

    async fn wait_until_listening(&self, before: usize) -> Result<()> {
        let begin = Instant::now();
        while self.starts() <= before {
            if !self.is_running() {
                let reason = reason(&self.log()).unwrap_or_else(|| "it wrote nothing".to_owned());
                return Err(Error::Server(format!("mongod ended before it listened: {reason}")));
            }
            if begin.elapsed() > START_LIMIT {
                return Err(Error::Timeout { what: "mongod to listen in its container".to_owned(), waited: START_LIMIT });
            }
            sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        match docker(["rm", "--force", "--volumes", &self.name]) {
            Err(error) if !error.to_string().contains("No such container") => {
                tracing::warn!(%error, "a container may be left behind");
            }
            _ => self.plan.watchdog.set(self.index, None),
        }
    }
}

/// Runs the `docker` command and returns what it prints; an error holds the last line of its complaint.
fn docker<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Result<String> {
    let output = command(arguments)
        .output()
        .map_err(|error| Error::NoServer(format!("cannot run docker ({error}): install Docker, or let MONGOD name a mongod")))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let complaint = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("docker said nothing");
        return Err(Error::Server(complaint.trim().to_owned()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

fn command<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new("docker");
    command.args(arguments).stdin(Stdio::null()).process_group(0);
    command
}

/// Where containers keep their data: a volume of the official image.
pub(crate) const DATA: &str = "/data/db";
const KEY_FILE: &str = "/testkit/keyfile";
const SERVER_PEM: &str = "/testkit/server.pem";
const CA: &str = "/testkit/ca.pem";
/// What `build-image.sh` builds.
const LOCAL_IMAGE: &str = "mongo-testkit:local";
const PORT_ATTEMPTS: usize = 10;

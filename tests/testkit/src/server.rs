//! One member's server: a mongod process with a log, or a container.

use std::{
    fs::{self, OpenOptions},
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    process::{Child, ExitStatus},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::{
    Error, Result,
    access::Login,
    binary::{Binary, Program},
    tls::Tls,
    watchdog::Watchdog,
};

/// What all servers of one deployment are started with.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) program: Program,
    pub(crate) members: usize,
    pub(crate) replica_set: Option<String>,
    pub(crate) login: Login,
    /// For members of a set with authentication.
    pub(crate) key_file: Option<PathBuf>,
    pub(crate) tls: Option<Tls>,
    pub(crate) fault_proxies: bool,
    pub(crate) cache_gb: f64,
    pub(crate) arguments: Vec<String>,
    pub(crate) watchdog: Watchdog,
    /// The deployment's folder. It comes last because it is dropped last: when no server writes into it any more.
    pub(crate) folder: TempDir,
}

/// Where a server finds its files and listens, in its own view.
#[derive(Debug)]
pub(crate) struct Surroundings {
    pub(crate) data: String,
    pub(crate) key_file: String,
    pub(crate) server_pem: String,
    pub(crate) ca: String,
    pub(crate) bind: &'static str,
}

impl Plan {
    pub(crate) fn arguments(&self, surroundings: &Surroundings, port: u16) -> Vec<String> {
        let mut arguments: Vec<String> = Vec::new();
        let mut option = |name: &str, value: &str| arguments.extend([name.to_owned(), value.to_owned()]);
        option("--dbpath", &surroundings.data);
        option("--bind_ip", surroundings.bind);
        option("--port", &port.to_string());
        option("--wiredTigerCacheSizeGB", &self.cache_gb.to_string());
        option("--setParameter", "enableTestCommands=1");
        option("--setParameter", "diagnosticDataCollectionEnabled=false");
        if let Some(name) = &self.replica_set {
            option("--replSet", name);
        }
        if self.tls.is_some() {
            option("--tlsMode", "requireTLS");
            option("--tlsCertificateKeyFile", &surroundings.server_pem);
            option("--tlsCAFile", &surroundings.ca);
        }
        if self.key_file.is_some() {
            option("--keyFile", &surroundings.key_file);
        }
        if self.tls.is_some() {
            arguments.push("--tlsAllowConnectionsWithoutCertificates".to_owned());
        }
        if self.login != Login::No {
            arguments.push("--auth".to_owned());
        }
        // Its socket would lie in a folder that everybody shares, and stay there after a kill.
        arguments.push("--nounixsocket".to_owned());
        arguments.extend(self.arguments.iter().cloned());
        arguments
    }
}

/// One member's server, running or not.
#[derive(Debug)]
pub(crate) enum Server {
    Process(Process),
    #[cfg(feature = "docker")]
    Container(crate::docker::Container),
}

impl Server {
    /// Starts member `index` on a free port and waits until it listens.
    pub(crate) async fn start(plan: Arc<Plan>, index: usize) -> Result<Self> {
        match &plan.program {
            Program::Binary(binary) => {
                let binary = binary.clone();
                Process::start(plan, binary, index).await.map(Self::Process)
            }
            #[cfg(feature = "docker")]
            Program::Image(image) => {
                let image = image.clone();
                crate::docker::Container::start(plan, image, index).await.map(Self::Container)
            }
        }
    }

    /// The port it listens on, which is not always the one that its set knows it by.
    pub(crate) fn port(&self) -> u16 {
        match self {
            Self::Process(process) => process.port,
            #[cfg(feature = "docker")]
            Self::Container(container) => container.port(),
        }
    }

    /// Where the server keeps its data, in its own view.
    pub(crate) fn data(&self) -> PathBuf {
        match self {
            Self::Process(process) => process.data(),
            #[cfg(feature = "docker")]
            Self::Container(_) => PathBuf::from(crate::docker::DATA),
        }
    }

    pub(crate) fn process_id(&self) -> Option<u32> {
        match self {
            Self::Process(process) => process.lock().child.as_ref().map(Child::id),
            #[cfg(feature = "docker")]
            Self::Container(_) => None,
        }
    }

    /// Starts it again after it has ended, with the same data and port.
    pub(crate) async fn start_again(&self) -> Result<()> {
        match self {
            Self::Process(process) => process.start_again().await,
            #[cfg(feature = "docker")]
            Self::Container(container) => container.start_again().await,
        }
    }

    pub(crate) fn kill(&self) -> Result<()> {
        match self {
            Self::Process(process) => process.kill(),
            #[cfg(feature = "docker")]
            Self::Container(container) => container.kill(),
        }
    }

    /// Asks it to end cleanly, and does not wait.
    pub(crate) fn terminate(&self) -> Result<()> {
        match self {
            Self::Process(process) => process.signal(Signal::TERM, Pause::Going),
            #[cfg(feature = "docker")]
            Self::Container(container) => container.terminate(),
        }
    }

    pub(crate) fn pause(&self) -> Result<()> {
        match self {
            Self::Process(process) => process.signal(Signal::STOP, Pause::Paused),
            #[cfg(feature = "docker")]
            Self::Container(container) => container.pause(),
        }
    }

    pub(crate) fn resume(&self) -> Result<()> {
        match self {
            Self::Process(process) => process.signal(Signal::CONT, Pause::Going),
            #[cfg(feature = "docker")]
            Self::Container(container) => container.resume(),
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        match self {
            Self::Process(process) => process.lock().is_running(),
            #[cfg(feature = "docker")]
            Self::Container(container) => container.is_running(),
        }
    }

    pub(crate) fn is_paused(&self) -> bool {
        match self {
            Self::Process(process) => process.lock().pause == Pause::Paused,
            #[cfg(feature = "docker")]
            Self::Container(container) => container.is_paused(),
        }
    }

    pub(crate) fn log_tail(&self, lines: usize) -> String {
        match self {
            Self::Process(process) => tail(&process.log_since(0), lines),
            #[cfg(feature = "docker")]
            Self::Container(container) => container.log_tail(lines),
        }
    }
}

/// A mongod process; dropping it kills it.
#[derive(Debug)]
pub(crate) struct Process {
    plan: Arc<Plan>,
    binary: Binary,
    index: usize,
    port: u16,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    child: Option<Child>,
    ended: Option<ExitStatus>,
    pause: Pause,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pause {
    Going,
    Paused,
}

/// How waiting for a start ended, where it did not fail.
#[derive(Debug, PartialEq, Eq)]
enum Started {
    Listening,
    /// Somebody else was faster to take the port.
    PortTaken,
}

impl Process {
    async fn start(plan: Arc<Plan>, binary: Binary, index: usize) -> Result<Self> {
        let state = State { child: None, ended: None, pause: Pause::Going };
        let mut process = Self { plan, binary, index, port: 0, state: Mutex::new(state) };
        fs::create_dir_all(process.data()).map_err(Error::path("make", &process.data()))?;
        for _ in 0..PORT_ATTEMPTS {
            process.port = free_port()?;
            if process.spawn().await? == Started::Listening {
                return Ok(process);
            }
        }
        Err(Error::Server(format!("{PORT_ATTEMPTS} ports in a row were taken by others before mongod could listen")))
    }

    async fn start_again(&self) -> Result<()> {
        for _ in 0..PORT_ATTEMPTS {
            if self.spawn().await? == Started::Listening {
                return Ok(());
            }
            sleep(Duration::from_millis(500)).await;
        }
        Err(Error::Server(format!("member {} cannot be restarted: its port {} was taken", self.index, self.port)))
    }

    async fn spawn(&self) -> Result<Started> {
        let from = fs::read(self.log()).unwrap_or_default().len();
        self.spawn_child()?;
        let begin = Instant::now();
        loop {
            let log = self.log_since(from);
            // Its own log, rather than an answer on the port, shows that it is this server and no other that listens.
            if log.contains("aiting for connections") {
                return Ok(Started::Listening);
            }
            let (running, ended) = {
                let mut state = self.lock();
                (state.is_running(), state.ended)
            };
            if !running {
                let log = self.log_since(from);
                if ended.is_some_and(|status| status.code() == Some(EXIT_NET_ERROR)) || log.contains("Address already in use") {
                    return Ok(Started::PortTaken);
                }
                let status = ended.map_or_else(|| "killed".to_owned(), |status| status.to_string());
                return Err(Error::Server(format!(
                    "mongod ended before it listened ({status}): {}",
                    reason(&log).unwrap_or_else(|| "it wrote nothing".to_owned())
                )));
            }
            if begin.elapsed() > START_LIMIT {
                self.kill()?;
                return Err(Error::Timeout { what: "mongod to listen".to_owned(), waited: START_LIMIT });
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    fn spawn_child(&self) -> Result<()> {
        let log = OpenOptions::new().create(true).append(true).open(self.log()).map_err(Error::path("write", &self.log()))?;
        // Also what is said before there is a log, such as a missing library, ends up there.
        let errors = log.try_clone().map_err(Error::path("write", &self.log()))?;
        let surroundings = Surroundings {
            data: self.data().to_string_lossy().into_owned(),
            key_file: text(self.plan.key_file.as_ref()),
            server_pem: text(self.plan.tls.as_ref().map(|tls| &tls.server)),
            ca: text(self.plan.tls.as_ref().map(|tls| &tls.ca)),
            bind: "127.0.0.1",
        };
        let mut command = self.binary.command();
        command.args(self.plan.arguments(&surroundings, self.port)).stdout(log).stderr(errors);
        let mut state = self.lock();
        if state.is_running() {
            return Err(Error::Server(format!("member {} runs already", self.index)));
        }
        let child = command.spawn().map_err(|error| Error::Server(format!("cannot start mongod: {error}")))?;
        self.plan.watchdog.set(self.index, Some(child.id().to_string()));
        *state = State { child: Some(child), ended: None, pause: Pause::Going };
        Ok(())
    }

    fn kill(&self) -> Result<()> {
        let mut state = self.lock();
        if let Some(mut child) = state.child.take() {
            child.kill().map_err(Error::io("kill mongod"))?;
            // Before it is reaped: from then on its number may belong to somebody else.
            self.plan.watchdog.set(self.index, None);
            state.ended = Some(child.wait().map_err(Error::io("wait for mongod"))?);
        }
        state.pause = Pause::Going;
        Ok(())
    }

    fn signal(&self, signal: Signal, pause: Pause) -> Result<()> {
        let mut state = self.lock();
        // Nobody else reaps it, so while it runs for us the number is its own.
        if !state.is_running() {
            return Err(Error::Server(format!("member {} is not running", self.index)));
        }
        let Some(child) = &state.child else { return Ok(()) };
        let process = Pid::from_child(child);
        kill_process(process, signal)
            .map_err(|error| Error::io(format!("send a signal to member {}", self.index))(error.into()))?;
        if pause == Pause::Paused {
            wait_until_stopped(process);
        }
        state.pause = pause;
        Ok(())
    }

    fn lock(&self) -> Locked<'_> {
        Locked { process: self, state: self.state.lock().unwrap_or_else(PoisonError::into_inner) }
    }

    fn data(&self) -> PathBuf {
        self.plan.folder.path().join(self.index.to_string()).join("data")
    }

    fn log(&self) -> PathBuf {
        self.plan.folder.path().join(self.index.to_string()).join("mongod.log")
    }

    fn log_since(&self, from: usize) -> String {
        let log = fs::read(self.log()).unwrap_or_default();
        String::from_utf8_lossy(log.get(from..).unwrap_or_default()).into_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            tracing::warn!(%error, "a mongod may be left behind");
        }
    }
}

/// The state under its lock, with what it takes to notice that the child has ended.
struct Locked<'a> {
    process: &'a Process,
    state: MutexGuard<'a, State>,
}

impl Locked<'_> {
    fn is_running(&mut self) -> bool {
        let ended = match &mut self.state.child {
            None => return false,
            Some(child) => match child.try_wait() {
                Ok(None) => return true,
                Ok(Some(status)) => Some(status),
                Err(error) => {
                    tracing::warn!(%error, "a mongod cannot be asked whether it runs");
                    return true;
                }
            },
        };
        self.process.plan.watchdog.set(self.process.index, None);
        *self.state = State { child: None, ended, pause: Pause::Going };
        false
    }
}

impl std::ops::Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl std::ops::DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

/// Returns when all threads of the child `process` have stopped; until then one of them may still answer somebody.
fn wait_until_stopped(process: Pid) {
    for _ in 0..2000 {
        // Asks for nothing but the stop, and leaves it to be asked for again.
        let options = WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        if !matches!(waitid(WaitId::Pid(process), options), Ok(None)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A port that nobody listens on at this moment.
pub(crate) fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(Error::io("find a free port"))?;
    Ok(listener.local_addr().map_err(Error::io("find a free port"))?.port())
}

/// The last `lines` lines of `log`.
pub(crate) fn tail(log: &str, lines: usize) -> String {
    let from = log.lines().count().saturating_sub(lines);
    log.lines().skip(from).collect::<Vec<_>>().join("\n")
}

/// What in a server's log may explain why it ended, on one line.
pub(crate) fn reason(log: &str) -> Option<String> {
    let lines = || log.lines().filter(|line| !line.trim().is_empty());
    let telling = lines().filter(|line| !line.starts_with('{') || line.contains(r#""s":"E""#) || line.contains(r#""s":"F""#));
    let mut telling: Vec<_> = telling.take(3).collect();
    if telling.is_empty() {
        telling.extend(lines().next_back());
    }
    let reason: String = telling.join(" | ").chars().take(600).collect();
    (!reason.is_empty()).then_some(reason)
}

fn text(path: Option<&PathBuf>) -> String {
    path.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default()
}

/// How long a server may take to listen: recovery on a busy machine takes its time.
pub(crate) const START_LIMIT: Duration = Duration::from_secs(60);
const PORT_ATTEMPTS: usize = 10;
/// mongod's exit code when it cannot listen.
const EXIT_NET_ERROR: i32 = 48;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_what_stands_out_in_the_log() {
        let log = concat!(
            r#"{"t":1,"s":"I","msg":"starting"}"#,
            "\n",
            r#"{"t":1,"s":"E","msg":"cannot listen"}"#,
            "\n",
            r#"{"t":1,"s":"I","msg":"bye"}"#,
            "\n",
        );
        assert_eq!(reason(log).as_deref(), Some(r#"{"t":1,"s":"E","msg":"cannot listen"}"#));
        let log = "Error parsing command line: unrecognised option '--x'\ntry 'mongod --help' for more information\n";
        assert!(reason(log).is_some_and(|reason| reason.starts_with("Error parsing command line")));
        assert_eq!(reason(r#"{"s":"I","msg":"only this"}"#).as_deref(), Some(r#"{"s":"I","msg":"only this"}"#));
        assert_eq!(reason(""), None);
    }

    #[test]
    fn the_tail_is_the_last_lines() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a\n", 2), "a");
    }
}

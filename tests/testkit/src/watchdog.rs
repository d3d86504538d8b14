//! Ends the servers of a process that was killed, and removes what they leave.

use std::{
    collections::BTreeMap,
    fmt,
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Mutex, PoisonError},
};

use crate::{Error, Result};

/// A small shell that outlives this process by a moment.
///
/// It reads a pipe that only this process holds open. Every line is the list of what is alive now; the end of the
/// pipe means that this process is gone, in whatever way (`kill -9`, a static that is never dropped), and then the
/// shell ends what the last line names and removes the folder.
pub(crate) struct Watchdog {
    state: Mutex<State>,
}

struct State {
    shell: Child,
    pipe: Option<ChildStdin>,
    live: BTreeMap<usize, String>,
}

impl Watchdog {
    /// Watches over `folder` and over servers that the command `end` ends when their names are appended to it.
    pub(crate) fn start(folder: &Path, end: &str) -> Result<Self> {
        let script = format!(
            // A server that is being killed may still write for a moment, hence the second and third removal.
            r#"live=; while read -r line; do live=$line; done; [ -z "$live" ] || {end} $live
               tries=0; while rm -rf -- "$1"; [ -e "$1" ] && [ $tries -lt 50 ]; do tries=$((tries + 1)); sleep 0.1; done"#
        );
        let mut shell = Command::new("sh")
            .args(["-c", &script, "mongo-testkit-watchdog"])
            .arg(folder)
            .current_dir("/")
            .stdin(Stdio::piped())
            // Whoever reads this process's output waits until all its holders are gone: hold none of it.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Interrupting the test from the terminal must not end its watchdog first.
            .process_group(0)
            .spawn()
            .map_err(Error::io("start sh, which guards the servers: is it on the PATH?"))?;
        let pipe = shell.stdin.take();
        Ok(Self { state: Mutex::new(State { shell, pipe, live: BTreeMap::new() }) })
    }

    /// Notes that `member` is now the process or container `name`, or none that must be ended.
    pub(crate) fn set(&self, member: usize, name: Option<String>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match name {
            Some(name) => state.live.insert(member, name),
            None => state.live.remove(&member),
        };
        let mut line = state.live.values().map(String::as_str).collect::<Vec<_>>().join(" ");
        line.push('\n');
        if let Some(pipe) = &mut state.pipe
            && let Err(error) = pipe.write_all(line.as_bytes())
        {
            tracing::warn!(%error, "the watchdog is gone: servers may outlive this process");
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.pipe = None;
        if let Err(error) = state.shell.wait() {
            tracing::warn!(%error, "the watchdog cannot be waited for");
        }
    }
}

impl fmt::Debug for Watchdog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watchdog").finish_non_exhaustive()
    }
}

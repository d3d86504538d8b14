//! One server of a deployment, and the ways to hurt it.

use std::{path::PathBuf, sync::Arc, time::Duration};

use mongo_core::mongodb::{
    Client,
    bson::{Bson, Document, doc},
};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    Error, FaultProxy, Result,
    access::{self, Access, Reach},
    server::{START_LIMIT, Server},
};

/// One server of a [`TestDeployment`](crate::TestDeployment).
///
/// What is done to it holds until it is undone: a killed member stays dead until [`restart`](Self::restart), a paused
/// one until [`resume`](Self::resume).
#[derive(Debug)]
pub struct Member {
    index: usize,
    server: Server,
    proxy: Option<FaultProxy>,
    access: Arc<Access>,
}

impl Member {
    pub(crate) fn new(index: usize, server: Server, proxy: Option<FaultProxy>, access: Arc<Access>) -> Self {
        Self { index, server, proxy, access }
    }

    /// The address that its set and its clients know it by: its fault proxy's where it has one, or else its own.
    pub fn host_port(&self) -> String {
        match &self.proxy {
            Some(proxy) => proxy.address().to_string(),
            None => self.own_host_port(),
        }
    }

    /// The connection string of this member alone (`directConnection=true`), through its fault proxy where it has one.
    pub fn uri(&self) -> String {
        self.access.uri(&[self.host_port()], Reach::Member)
    }

    /// A new client of this member alone, at [`uri`](Self::uri), in the caller's runtime.
    ///
    /// # Errors
    ///
    /// [`Error::Command`] when the driver refuses the connection string.
    pub async fn client(&self) -> Result<Client> {
        access::client(&self.uri()).await
    }

    /// Its fault proxy, where the deployment was built [with them](crate::Builder::with_fault_proxies).
    ///
    /// Clients and the other members reach it through the proxy. What it sends to others goes through theirs.
    pub fn fault_proxy(&self) -> Option<&FaultProxy> {
        self.proxy.as_ref()
    }

    /// The folder of its data. In a container it is a path in there.
    pub fn dbpath(&self) -> PathBuf {
        self.server.data()
    }

    /// The process's number while it runs; `None` in a container.
    pub fn process_id(&self) -> Option<u32> {
        self.server.process_id()
    }

    /// Whether the server runs. A paused one does.
    pub fn is_running(&self) -> bool {
        self.server.is_running()
    }

    /// The last `lines` lines of its log, across restarts.
    pub fn log_tail(&self, lines: usize) -> String {
        self.server.log_tail(lines)
    }

    /// Kills it with SIGKILL and returns when it is gone. Does nothing to one that is not running.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the operating system refuses, [`Error::Server`] when Docker does.
    pub fn kill(&self) -> Result<()> {
        self.server.kill()
    }

    /// Freezes it with SIGSTOP: its connections stay open and nothing answers.
    ///
    /// # Errors
    ///
    /// [`Error::Server`] when it is not running; otherwise as [`kill`](Self::kill).
    pub fn pause(&self) -> Result<()> {
        self.server.pause()
    }

    /// Lets a paused one go on, with SIGCONT.
    ///
    /// # Errors
    ///
    /// As [`pause`](Self::pause).
    pub fn resume(&self) -> Result<()> {
        self.server.resume()
    }

    /// Shuts it down cleanly and waits until it has ended; one that does not end within 20 seconds is killed.
    ///
    /// Does nothing to one that is not running, and wakes a paused one first.
    ///
    /// # Errors
    ///
    /// As [`kill`](Self::kill).
    pub async fn stop(&self) -> Result<()> {
        if !self.is_running() {
            return Ok(());
        }
        if self.server.is_paused() {
            self.resume()?;
        }
        // A member of a set gives its clients fifteen seconds to leave, from MongoDB 5.0; earlier ones do not know the
        // parameter. A server that does not answer can still be told to end.
        let client = self.direct_client(&self.access).await?;
        let at_once = doc! { "setParameter": 1, "shutdownTimeoutMillisForSignaledShutdown": 0 };
        let _ = timeout(Duration::from_secs(1), async { client.database("admin").run_command(at_once).await }).await;
        self.server.terminate()?;
        let begin = Instant::now();
        while self.is_running() {
            if begin.elapsed() > STOP_LIMIT {
                tracing::warn!(member = self.index, "a server did not shut down in time and is killed");
                return self.kill();
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    /// Starts it again with the same data, port and arguments, and waits until it answers. A running one is
    /// [stopped](Self::stop) first, a paused one killed.
    ///
    /// In a set, the member may need a moment more to become primary or secondary again. Fail points are gone.
    ///
    /// # Errors
    ///
    /// [`Error::Server`] when it does not start again, [`Error::Timeout`] when it does not answer in a minute.
    pub async fn restart(&self) -> Result<()> {
        if self.server.is_paused() {
            self.kill()?;
        }
        self.stop().await?;
        self.server.start_again().await?;
        let client = self.direct_client(&self.access).await?;
        let begin = Instant::now();
        while hello(&client).await.is_none() {
            if !self.is_running() {
                return Err(Error::Server(format!("member {} ended soon after its restart", self.index)));
            }
            if begin.elapsed() > START_LIMIT {
                let what = format!("member {} to answer after its restart", self.index);
                return Err(Error::Timeout { what, waited: START_LIMIT });
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    /// Sets the fail point `failCommand`; `mode` is a document such as `{times: 1}`, or `"alwaysOn"` or `"off"`.
    pub(crate) async fn fail_command(&self, mode: Bson, data: Document) -> Result<()> {
        let mut command = doc! { "configureFailPoint": "failCommand", "mode": mode };
        if !data.is_empty() {
            command.insert("data", data);
        }
        let client = self.direct_client(&self.access).await?;
        let answer = client.database("admin").run_command(command).await;
        answer.map(|_| ()).map_err(Error::command(format!("setting a fail point on member {}", self.index)))
    }

    /// Whether there is any use in asking it something.
    pub(crate) fn may_answer(&self) -> bool {
        self.server.is_running() && !self.server.is_paused()
    }

    /// A client of the server itself, past its fault proxy.
    pub(crate) async fn direct_client(&self, access: &Access) -> Result<Client> {
        let mut options = access::client_options(&access.uri(&[self.own_host_port()], Reach::Member)).await?;
        options.server_selection_timeout = Some(Duration::from_secs(10));
        Client::with_options(options).map_err(Error::command("making a client"))
    }

    fn own_host_port(&self) -> String {
        format!("127.0.0.1:{}", self.server.port())
    }
}

/// What the server says of itself, unless it says nothing for half a second.
pub(crate) async fn hello(client: &Client) -> Option<Document> {
    let ask = async { client.database("admin").run_command(doc! { "hello": 1 }).await };
    timeout(Duration::from_millis(500), ask).await.ok()?.ok()
}

/// How often a state is asked for.
pub(crate) const POLL: Duration = Duration::from_millis(20);
const STOP_LIMIT: Duration = Duration::from_secs(20);

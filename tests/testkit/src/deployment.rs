//! A running standalone or replica set.

use std::{path::Path, sync::Arc, time::Duration};

use mongo_core::mongodb::{
    Client,
    bson::{Bson, Document, doc},
    options::ClientOptions,
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::{
    Builder, Error, Member, Result, Source,
    access::{self, Access, Login, PASSWORD, Reach, USER},
    member::{POLL, hello},
    server::Plan,
};

/// A MongoDB of its own for a test: a standalone or a replica set, on free ports of 127.0.0.1.
///
/// Dropping it kills every server and removes every file, before the drop returns and also while a test panics. If the
/// process is killed, a watchdog does the same a moment later.
///
/// Clients belong to the runtime that made them, deployments do not: one deployment can serve many tests with a
/// runtime each, as [`shared`](crate::shared()) does.
///
/// ```no_run
/// # async fn example() -> mongo_testkit::Result<()> {
/// use mongo_testkit::TestDeployment;
///
/// let deployment = TestDeployment::replica_set(3).with_auth().start().await?;
/// let client = deployment.client().await?;
/// deployment.member(deployment.primary().await?).kill()?;
/// let successor = deployment.primary().await?;
/// # let _ = (client, successor);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TestDeployment {
    // Fields are dropped in this order: the servers end before the folder goes.
    members: Vec<Member>,
    access: Arc<Access>,
    source: Source,
    plan: Arc<Plan>,
}

impl TestDeployment {
    /// Begins one server that is no member of a set.
    pub fn standalone() -> Builder {
        Builder::standalone()
    }

    /// Begins a replica set of `members`, 1 to 7.
    pub fn replica_set(members: usize) -> Builder {
        Builder::replica_set(members)
    }

    pub(crate) fn new(members: Vec<Member>, access: Arc<Access>, source: Source, plan: Arc<Plan>) -> Self {
        Self { members, access, source, plan }
    }

    /// The connection string, with credentials and TLS options where they are on, and through the fault proxies where
    /// those are on.
    ///
    /// A set is named (`replicaSet=…`), a standalone reached with `directConnection=true`.
    pub fn uri(&self) -> String {
        let hosts: Vec<_> = self.members.iter().map(Member::host_port).collect();
        self.access.uri(&hosts, Reach::Deployment)
    }

    /// The options that [`uri`](Self::uri) stands for, to be changed before a client is made of them.
    ///
    /// # Errors
    ///
    /// [`Error::Command`] when the driver refuses the connection string.
    pub async fn client_options(&self) -> Result<ClientOptions> {
        access::client_options(&self.uri()).await
    }

    /// A new client in the caller's runtime.
    ///
    /// # Errors
    ///
    /// As [`client_options`](Self::client_options).
    pub async fn client(&self) -> Result<Client> {
        access::client(&self.uri()).await
    }

    /// All members, in the order in which every `index` counts them. A standalone is one member.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The member `index`.
    ///
    /// # Panics
    ///
    /// When there are not so many members.
    pub fn member(&self, index: usize) -> &Member {
        &self.members[index]
    }

    /// The name of the replica set; `None` for a standalone.
    pub fn replica_set_name(&self) -> Option<&str> {
        self.access.replica_set.as_deref()
    }

    /// The name and the password of the user with the role `root`, where authentication is on.
    pub fn credentials(&self) -> Option<(&str, &str)> {
        (self.access.login != Login::No).then_some((USER, PASSWORD))
    }

    /// The PEM file of the authority to trust, where TLS is on.
    pub fn ca_file(&self) -> Option<&Path> {
        self.access.tls.as_ref().map(|tls| tls.ca.as_path())
    }

    /// A PEM file with a client's certificate and its key, where TLS is on. The servers ask for none.
    pub fn client_certificate(&self) -> Option<&Path> {
        self.access.tls.as_ref().map(|tls| tls.client.as_path())
    }

    /// Where the servers came from.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The servers' version, for example `6.0.5`.
    pub fn version(&self) -> &str {
        self.source.version()
    }

    /// The folder of the deployment's files, which goes with the deployment.
    pub fn folder(&self) -> &Path {
        self.plan.folder.path()
    }

    /// The index of the primary; waits until there is one. A standalone is its own primary.
    ///
    /// Where two members claim to be primary, for example after a pause, it is the one that was elected last.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] when there is none in 30 seconds.
    pub async fn primary(&self) -> Result<usize> {
        primary(&self.members, &self.access, &[]).await
    }

    /// Makes the primary step down and waits for a new one.
    ///
    /// In a set of several another member takes over, and the old primary cannot come back for ten seconds. In a set
    /// of one the same member comes back after a second as secondary.
    ///
    /// # Errors
    ///
    /// [`Error::Command`] when the server refuses, as a standalone does, or a primary without a secondary that is up
    /// to date; [`Error::Timeout`] when there is no new primary in 30 seconds.
    pub async fn step_down(&self) -> Result<()> {
        let old = self.primary().await?;
        let command = if self.members.len() == 1 {
            doc! { "replSetStepDown": 1, "force": true }
        } else {
            doc! { "replSetStepDown": 10, "secondaryCatchUpPeriodSecs": 8 }
        };
        let client = self.member(old).direct_client(&self.access).await?;
        client.database("admin").run_command(command).await.map_err(Error::command("stepping the primary down"))?;
        let not: &[usize] = if self.members.len() == 1 { &[] } else { &[old] };
        primary(&self.members, &self.access, not).await.map(|_| ())
    }

    /// Sets the fail point `failCommand` on a member, past its fault proxy.
    ///
    /// `mode` says when (`doc! { "times": 1 }`, `doc! { "skip": 2 }`, `"alwaysOn"`), `data` which commands and how:
    /// `failCommands`, and `errorCode`, `closeConnection`, `blockConnection` with `blockTimeMS`, `errorLabels`, and
    /// `appName` to spare other clients.
    ///
    /// # Errors
    ///
    /// [`Error::Command`] when the server refuses or does not answer.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(deployment: mongo_testkit::TestDeployment) -> mongo_testkit::Result<()> {
    /// use mongo_core::mongodb::bson::doc;
    ///
    /// let data = doc! { "failCommands": ["insert"], "errorCode": 91 };
    /// deployment.fail_command(0, doc! { "times": 2 }, data).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn fail_command(&self, member: usize, mode: impl Into<Bson> + Send, data: Document) -> Result<()> {
        self.member(member).fail_command(mode.into(), data).await
    }

    /// Takes the fail point of [`fail_command`](Self::fail_command) off a member again.
    ///
    /// # Errors
    ///
    /// As [`fail_command`](Self::fail_command).
    pub async fn fail_command_off(&self, member: usize) -> Result<()> {
        self.member(member).fail_command(Bson::from("off"), Document::new()).await
    }

    /// Shuts all servers down cleanly, then removes every file.
    ///
    /// It is slower than a drop, which kills; it is for tests that look at how the servers end. A server that refuses
    /// is killed.
    pub async fn stop(self) {
        // Secondaries first: a primary that hears of no majority only waits.
        let primary = match self.members.len() {
            1 => 0,
            _ => self.primary().await.unwrap_or_default(),
        };
        let order = (0..self.members.len()).filter(|index| *index != primary).chain([primary]);
        for index in order {
            if let Err(error) = self.member(index).stop().await {
                tracing::warn!(index, %error, "a server does not shut down and is killed");
            }
        }
    }
}

/// The primary among `members`, but none of `not`; waits for it.
pub(crate) async fn primary(members: &[Member], access: &Access, not: &[usize]) -> Result<usize> {
    let mut clients = Vec::new();
    for member in members {
        clients.push(member.direct_client(access).await?);
    }
    let begin = Instant::now();
    loop {
        let mut claims = Vec::new();
        for (index, answer) in ask_all(members, &clients).await {
            if is(&answer, "isWritablePrimary") {
                // Higher for a later election; a standalone has none.
                claims.push((answer.get_object_id("electionId").map(|id| id.bytes()).unwrap_or_default(), index));
            }
        }
        match claims.into_iter().max() {
            Some((_, index)) if !not.contains(&index) => return Ok(index),
            _ => {}
        }
        if begin.elapsed() > ELECTION_LIMIT {
            return Err(Error::Timeout { what: "a primary".to_owned(), waited: ELECTION_LIMIT });
        }
        sleep(POLL).await;
    }
}

/// Waits until every member is primary or secondary.
pub(crate) async fn settled(members: &[Member], access: &Access) -> Result<()> {
    let mut clients = Vec::new();
    for member in members {
        clients.push(member.direct_client(access).await?);
    }
    let begin = Instant::now();
    loop {
        let answers = ask_all(members, &clients).await;
        let ready = answers.iter().filter(|(_, answer)| is(answer, "isWritablePrimary") || is(answer, "secondary"));
        if ready.count() == members.len() {
            return Ok(());
        }
        if begin.elapsed() > ELECTION_LIMIT {
            let what = "every member of the set to become secondary".to_owned();
            return Err(Error::Timeout { what, waited: ELECTION_LIMIT });
        }
        sleep(POLL).await;
    }
}

/// What all members that answer say of themselves.
async fn ask_all(members: &[Member], clients: &[Client]) -> Vec<(usize, Document)> {
    let mut asked = JoinSet::new();
    for (index, (member, client)) in members.iter().zip(clients).enumerate() {
        if member.may_answer() {
            let client = client.clone();
            asked.spawn(async move { (index, hello(&client).await) });
        }
    }
    let mut answers = Vec::new();
    while let Some(answered) = asked.join_next().await {
        if let Ok((index, Some(answer))) = answered {
            answers.push((index, answer));
        }
    }
    answers
}

fn is(answer: &Document, state: &str) -> bool {
    answer.get_bool(state).unwrap_or(false)
}

const ELECTION_LIMIT: Duration = Duration::from_secs(30);

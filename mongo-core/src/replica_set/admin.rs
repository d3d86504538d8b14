//! Making, changing and steering a replica set.

use std::time::Duration;

use mongodb::{
    Client,
    bson::{Document, doc},
    error::{Error as DriverError, ErrorKind as DriverKind},
    options::{ReadPreference, SelectionCriteria},
};
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    config::ReplicaSetConfig,
    status::ReplicaSetStatus,
    wire::{Dialect, integer},
};
use crate::{
    connect::ConnectOptions,
    error::{Error, ErrorKind, Result},
};

/// Makes a replica set of servers that were started with `--replSet` and hold no data.
///
/// `member` reaches one of the members, itself part of `config`; of several hosts the first is taken, and the connection
/// is direct, since there is no set to discover yet. The other members must be up and empty too. On servers with access
/// control connect from the same machine (the localhost exception) or as a user that exists there.
///
/// The set has no primary yet when this returns: connect anew, now to the set, and
/// [`wait_for_primary`](ReplicaSetExt::wait_for_primary). A client from before keeps believing that there is no
/// replica set. Privilege: `replSetConfigure` (role `clusterManager`).
///
/// # Errors
/// [`ErrorKind::InvalidInput`] when the configuration breaks a rule, names another set than the servers were started for,
/// or does not name this member; [`ErrorKind::Conflict`] when it has been initiated before; [`ErrorKind::Unavailable`]
/// when another member does not answer; [`ErrorKind::Unsupported`] when the server was started without `--replSet`;
/// [`ErrorKind::Unauthorized`].
///
/// # Cancel safety
/// After a dropped future the set may have been initiated or not: calling again says so.
///
/// # Examples
/// ```no_run
/// # async fn example() -> mongo_core::Result<()> {
/// use mongo_core::ConnectOptions;
/// use mongo_core::replica_set::{Member, ReplicaSetConfig, initiate};
///
/// let config = ReplicaSetConfig::new("rs0").with_member(Member::new("db.example:27017"));
/// initiate(&ConnectOptions::from_uri("mongodb://db.example:27017")?, &config).await?;
/// # Ok(()) }
/// ```
pub async fn initiate(member: &ConnectOptions, config: &ReplicaSetConfig) -> Result<()> {
    config.validate()?;
    let mut options = member.to_client_options().await?;
    options.direct_connection = Some(true);
    options.hosts.truncate(1);
    // The member has no name of a set to compare with yet.
    options.repl_set_name = None;
    let client = Client::with_options(options)?;
    let outcome = initiate_through(&client, config).await;
    client.shutdown().immediate(true).await;
    outcome
}

async fn initiate_through(client: &Client, config: &ReplicaSetConfig) -> Result<()> {
    let hello = hello(client, ReadPreference::Primary.into()).await?;
    if let Ok(name) = hello.get_str("setName") {
        return Err(Error::new(ErrorKind::Conflict, "the replica set has been initiated before").with_context("set", name));
    }
    let dialect = dialect(&hello);
    config.check_dialect(dialect)?;
    let command = doc! { "replSetInitiate": config.to_document(dialect) };
    client.database("admin").run_command(command).await.map_err(classify)?;
    Ok(())
}

/// Steers a replica set, on a driver's [`Client`].
///
/// The trait is implemented for `Client` and is not meant to be implemented elsewhere.
pub trait ReplicaSetExt: sealed::Sealed {
    /// Waits until the set has a primary that takes writes.
    ///
    /// Through a direct connection to another member it waits until that member knows a primary. Needs no privilege.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] when there is none in time, with the last failure as its source; at once,
    /// [`ErrorKind::Unsupported`] on a server that is no member of a replica set, and [`ErrorKind::Unauthorized`] when
    /// authentication fails.
    ///
    /// # Cancel safety
    /// Reads only: dropping the future is safe.
    fn wait_for_primary(&self, timeout: Duration) -> impl Future<Output = Result<Primary>> + Send;

    /// The configuration of the set. Privilege: `replSetGetConfig` (role `clusterMonitor`).
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] on a server that is no member of a replica set,
    /// [`ErrorKind::NotFound`] on one whose set has not been initiated.
    ///
    /// # Cancel safety
    /// Reads only: dropping the future is safe.
    fn replica_set_config(&self) -> impl Future<Output = Result<ReplicaSetConfig>> + Send;

    /// How the members are, as the primary sees it, or another member when there is none.
    ///
    /// Privilege: `replSetGetStatus` (role `clusterMonitor`).
    ///
    /// # Errors
    /// As [`replica_set_config`](Self::replica_set_config).
    ///
    /// # Cancel safety
    /// Reads only: dropping the future is safe.
    fn replica_set_status(&self) -> impl Future<Output = Result<ReplicaSetStatus>> + Send;

    /// Changes the configuration: reads it, lets `change` edit it, checks it, raises its version and installs it.
    ///
    /// From server 4.4 on, one voting member can be added or removed at a time, and a change waits until a majority
    /// has the one before; this function waits for up to 30 seconds. When somebody else changes the configuration
    /// meanwhile, it is read and edited again, so `change` may be called several times. Returns what has been
    /// installed. Privilege: `replSetConfigure` (role `clusterManager`).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] when the configuration breaks a rule, and whatever `change` returns;
    /// [`ErrorKind::Unavailable`] when there is no primary or the change before did not reach a majority in time;
    /// [`ErrorKind::Timeout`] when this one is installed and has not reached a majority after 10 seconds;
    /// [`ErrorKind::Unauthorized`].
    ///
    /// # Cancel safety
    /// After a dropped future the change may have been installed or not: read the configuration.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(client: mongo_core::mongodb::Client) -> mongo_core::Result<()> {
    /// use mongo_core::replica_set::{Member, ReconfigureMode, ReplicaSetExt};
    ///
    /// let installed = client
    ///     .reconfigure(ReconfigureMode::Safe, |config| {
    ///         *config = config.clone().with_member(Member::new("d.example:27017").non_voting());
    ///         Ok(())
    ///     })
    ///     .await?;
    /// println!("version {}", installed.version);
    /// # Ok(()) }
    /// ```
    fn reconfigure<F>(&self, mode: ReconfigureMode, change: F) -> impl Future<Output = Result<ReplicaSetConfig>> + Send
    where
        F: Fn(&mut ReplicaSetConfig) -> Result<()> + Send + Sync;

    /// Makes the primary a secondary, so that another member is elected.
    ///
    /// Returns when the old primary has stepped down, not when there is a new one: see
    /// [`wait_for_primary`](Self::wait_for_primary). A connection that is lost in the course of it (old servers close all)
    /// is taken for success once the old primary is no longer known as one. Privilege: `replSetStateChange`
    /// (role `clusterManager`).
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] when no secondary that can be elected catches up in time, or when there is no primary;
    /// [`ErrorKind::InvalidInput`] when the wait is not shorter than the time to stay secondary;
    /// [`ErrorKind::Unauthorized`].
    ///
    /// # Cancel safety
    /// After a dropped future the primary may step down or not.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(client: mongo_core::mongodb::Client) -> mongo_core::Result<()> {
    /// use std::time::Duration;
    ///
    /// use mongo_core::replica_set::{ReplicaSetExt, StepDownSettings};
    ///
    /// client.step_down(StepDownSettings::default()).await?;
    /// let primary = client.wait_for_primary(Duration::from_secs(30)).await?;
    /// # Ok(()) }
    /// ```
    fn step_down(&self, settings: StepDownSettings) -> impl Future<Output = Result<()>> + Send;
}

/// A primary, as [`ReplicaSetExt::wait_for_primary`] found it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Primary {
    /// Its host and port, as the configuration has them.
    pub host: String,
    /// Name of the set.
    pub set: String,
}

/// Whose agreement a change of the configuration needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum ReconfigureMode {
    /// A majority's, through the primary: nothing that a majority has acknowledged is lost.
    Safe,
    /// Nobody's, through whatever member the client reaches: for a set that has lost its majority for good. Writes that
    /// a majority had acknowledged can be rolled back, and two members may both believe to be primary for a time.
    Force,
}

impl ReconfigureMode {
    fn criteria(self) -> SelectionCriteria {
        match self {
            Self::Safe => ReadPreference::Primary.into(),
            Self::Force => anyone(),
        }
    }
}

/// How [`ReplicaSetExt::step_down`] steps down.
///
/// ```
/// use std::time::Duration;
/// use mongo_core::replica_set::StepDownSettings;
///
/// let settings = StepDownSettings::default().with_duration(Duration::from_secs(120));
/// assert_eq!(settings.catch_up, Duration::from_secs(10));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct StepDownSettings {
    /// How long the member will not stand for election, in whole seconds. Default 60 s.
    pub duration: Duration,
    /// How long it waits for a secondary to catch up before it gives up, in whole seconds. Default 10 s.
    pub catch_up: Duration,
    /// What to do when none has. Default [`OnLag::Stay`].
    pub on_lag: OnLag,
}

impl Default for StepDownSettings {
    fn default() -> Self {
        Self { duration: Duration::from_secs(60), catch_up: Duration::from_secs(10), on_lag: OnLag::Stay }
    }
}

impl StepDownSettings {
    /// Sets how long the member will not stand for election.
    #[must_use]
    pub fn with_duration(mut self, duration: Duration) -> Self {
        self.duration = duration;
        self
    }

    /// Sets how long it waits for a secondary to catch up.
    #[must_use]
    pub fn with_catch_up(mut self, time: Duration) -> Self {
        self.catch_up = time;
        self
    }

    /// Sets what to do when none has caught up.
    #[must_use]
    pub fn with_on_lag(mut self, choice: OnLag) -> Self {
        self.on_lag = choice;
        self
    }

    fn command(&self) -> Result<Document> {
        let (duration, catch_up) = (self.duration.as_secs(), self.catch_up.as_secs());
        if catch_up >= duration {
            return Err(Error::invalid("catch_up must be shorter than the time to stay secondary"));
        }
        let seconds = |seconds: u64| i32::try_from(seconds).map_err(|_| Error::invalid("a step-down lasts too long"));
        Ok(doc! {
            "replSetStepDown": seconds(duration)?,
            "secondaryCatchUpPeriodSecs": seconds(catch_up)?,
            "force": self.on_lag == OnLag::StepDown,
        })
    }
}

/// What a primary does when no secondary has caught up in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum OnLag {
    /// It remains primary, and the call is an error.
    Stay,
    /// It steps down. Writes that no secondary has are rolled back unless it becomes primary again first.
    StepDown,
}

/// How often a state that nobody announces is looked at.
const POLL: Duration = Duration::from_millis(50);
/// How long a change of the configuration may wait for the one before it.
const RECONFIGURE_TIMEOUT: Duration = Duration::from_secs(30);

impl ReplicaSetExt for Client {
    async fn wait_for_primary(&self, timeout: Duration) -> Result<Primary> {
        let deadline = Instant::now() + timeout;
        let mut last = None;
        loop {
            match timeout_at(deadline, hello(self, ReadPreference::Primary.into())).await {
                Ok(Ok(hello)) => match primary(&hello)? {
                    Some(primary) => return Ok(primary),
                    None => last = None,
                },
                Ok(Err(error)) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout) => last = Some(error),
                Ok(Err(error)) => return Err(error),
                Err(_) => {
                    let error = Error::new(ErrorKind::Timeout, "the replica set has no primary")
                        .with_context("waited seconds", timeout.as_secs_f64());
                    return Err(match last {
                        Some(last) => error.with_source(last),
                        None => error,
                    });
                }
            }
            sleep(POLL).await;
        }
    }

    async fn replica_set_config(&self) -> Result<ReplicaSetConfig> {
        read_config(self, anyone()).await
    }

    async fn replica_set_status(&self) -> Result<ReplicaSetStatus> {
        let reply = self
            .database("admin")
            .run_command(doc! { "replSetGetStatus": 1 })
            .selection_criteria(anyone())
            .await
            .map_err(classify)?;
        ReplicaSetStatus::from_reply(&reply)
    }

    async fn reconfigure<F>(&self, mode: ReconfigureMode, change: F) -> Result<ReplicaSetConfig>
    where
        F: Fn(&mut ReplicaSetConfig) -> Result<()> + Send + Sync,
    {
        let deadline = Instant::now() + RECONFIGURE_TIMEOUT;
        loop {
            let current = read_config(self, mode.criteria()).await?;
            let mut next = current.clone();
            change(&mut next)?;
            next.version = current.version + 1;
            next.validate()?;
            current.check_change(&next, mode == ReconfigureMode::Force)?;
            let Err(error) = install(self, &next, mode).await else {
                // A forced change gets a version of the server's own.
                return read_config(self, mode.criteria()).await;
            };
            let again = match error.server_code() {
                // ConfigurationInProgress, CurrentConfigNotCommittedYet.
                Some(109 | 308) => true,
                // Also what a configuration is that somebody else was faster with.
                Some(103) => read_config(self, mode.criteria()).await?.version != current.version,
                _ => false,
            };
            if !again || Instant::now() >= deadline {
                return Err(error);
            }
            sleep(POLL).await;
        }
    }

    async fn step_down(&self, settings: StepDownSettings) -> Result<()> {
        let command = settings.command()?;
        // For servers that close the connection instead of answering: who it was.
        let before = hello(self, ReadPreference::Primary.into()).await?.get_str("me").map(str::to_owned).ok();
        match self.database("admin").run_command(command).await {
            Ok(_) => Ok(()),
            Err(error) if connection_closed(&error) => confirm_step_down(self, before, settings.catch_up, error).await,
            Err(error) => Err(classify(error)),
        }
    }
}

/// What a member says of itself; through a direct connection always that member. Needs no privilege.
async fn hello(client: &Client, criteria: SelectionCriteria) -> Result<Document> {
    let admin = client.database("admin");
    match admin.run_command(doc! { "hello": 1 }).selection_criteria(criteria.clone()).await {
        // Servers before 4.4.2 know it by its old name only.
        Err(error) if matches!(&*error.kind, DriverKind::Command(command) if command.code == 59) => {
            Ok(admin.run_command(doc! { "isMaster": 1 }).selection_criteria(criteria).await?)
        }
        answer => Ok(answer?),
    }
}

fn primary(hello: &Document) -> Result<Option<Primary>> {
    let is_writable = ["isWritablePrimary", "ismaster"].iter().any(|name| hello.get_bool(name).unwrap_or(false));
    let Ok(set) = hello.get_str("setName") else {
        // A member that waits to be initiated is not one yet; anything else never will be.
        if hello.get_bool("isreplicaset").unwrap_or(false) {
            return Ok(None);
        }
        return Err(Error::new(ErrorKind::Unsupported, "the server is not a member of a replica set"));
    };
    let host = match hello.get_str("primary") {
        Ok(host) if is_writable || hello.get_bool("secondary").unwrap_or(false) => host,
        // Elected, and still catching up: it takes no writes yet.
        _ => return Ok(None),
    };
    Ok(Some(Primary { host: host.to_owned(), set: set.to_owned() }))
}

fn dialect(hello: &Document) -> Dialect {
    Dialect::of_wire_version(hello.get("maxWireVersion").and_then(integer).unwrap_or(0))
}

/// The primary, or another member when there is none.
fn anyone() -> SelectionCriteria {
    SelectionCriteria::ReadPreference(ReadPreference::PrimaryPreferred { options: None })
}

async fn read_config(client: &Client, criteria: SelectionCriteria) -> Result<ReplicaSetConfig> {
    let admin = client.database("admin");
    let command = admin.run_command(doc! { "replSetGetConfig": 1 }).selection_criteria(criteria);
    let reply = command.await.map_err(classify)?;
    let config = reply
        .get_document("config")
        .map_err(|_| Error::corrupt("the server's reply to replSetGetConfig has no configuration"))?;
    ReplicaSetConfig::from_document(config)
}

async fn install(client: &Client, config: &ReplicaSetConfig, mode: ReconfigureMode) -> Result<()> {
    let criteria = mode.criteria();
    let dialect = dialect(&hello(client, criteria.clone()).await?);
    config.check_dialect(dialect)?;
    let mut command = doc! { "replSetReconfig": config.to_document(dialect), "maxTimeMS": 10_000 };
    if mode == ReconfigureMode::Force {
        command.insert("force", true);
    }
    client.database("admin").run_command(command).selection_criteria(criteria).await.map_err(classify)?;
    Ok(())
}

fn connection_closed(error: &DriverError) -> bool {
    matches!(&*error.kind, DriverKind::Io(_) | DriverKind::ConnectionPoolCleared { .. })
}

/// Decides whether a primary that closed the connection has stepped down.
async fn confirm_step_down(client: &Client, before: Option<String>, catch_up: Duration, error: DriverError) -> Result<()> {
    let wait = catch_up + Duration::from_secs(5);
    match client.wait_for_primary(wait).await {
        // Nobody is primary any more.
        Err(lost) if lost.kind() == ErrorKind::Timeout => Ok(()),
        Err(lost) => Err(lost),
        Ok(now) if before.as_deref().is_some_and(|before| before != now.host) => Ok(()),
        Ok(_) => Err(Error::from(error).wrap("the connection was lost, and the primary is still the same")),
    }
}

/// What these commands' codes mean here.
fn classify(error: DriverError) -> Error {
    let error = Error::from(error);
    let (kind, message) = match error.server_code() {
        Some(76) => (ErrorKind::Unsupported, "the server was started without --replSet"),
        Some(94) => (ErrorKind::NotFound, "the replica set has not been initiated"),
        Some(23) => (ErrorKind::Conflict, "the replica set has been initiated before"),
        Some(104) => (ErrorKind::InvalidInput, "the primary could no longer be elected: step it down first"),
        Some(109 | 308) => (ErrorKind::Unavailable, "an earlier change of the configuration has not reached a majority"),
        _ => return error,
    };
    Error::new(kind, message).with_source(error)
}

mod sealed {
    /// Keeps the trait to the driver's client, so that adding a method breaks nobody.
    #[allow(unnameable_types, reason = "that it cannot be named is its purpose")]
    pub trait Sealed {}

    impl Sealed for mongodb::Client {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_primary_is_one_that_takes_writes_or_that_a_secondary_knows() {
        let primary_says = doc! { "setName": "rs", "isWritablePrimary": true, "primary": "a:1", "me": "a:1" };
        let found = Primary { host: "a:1".to_owned(), set: "rs".to_owned() };
        assert_eq!(primary(&primary_says).unwrap(), Some(found.clone()));
        let old_server = doc! { "setName": "rs", "ismaster": true, "primary": "a:1" };
        assert_eq!(primary(&old_server).unwrap(), Some(found.clone()));
        let secondary_says = doc! { "setName": "rs", "isWritablePrimary": false, "secondary": true, "primary": "a:1" };
        assert_eq!(primary(&secondary_says).unwrap(), Some(found));
        let catching_up = doc! { "setName": "rs", "isWritablePrimary": false, "secondary": false, "primary": "a:1" };
        assert_eq!(primary(&catching_up).unwrap(), None);
        assert_eq!(primary(&doc! { "setName": "rs", "secondary": true }).unwrap(), None);
        assert_eq!(primary(&doc! { "isreplicaset": true }).unwrap(), None);
        assert_eq!(primary(&doc! { "isWritablePrimary": true }).map_err(|error| error.kind()), Err(ErrorKind::Unsupported));
    }

    #[test]
    fn stepping_down_lasts_longer_than_its_wait() {
        let settings = StepDownSettings::default();
        assert_eq!(settings.command().unwrap().get_i32("replSetStepDown").unwrap(), 60);
        assert!(settings.clone().with_catch_up(Duration::from_secs(60)).command().is_err());
        let forced = settings.with_on_lag(OnLag::StepDown).command().unwrap();
        assert!(forced.get_bool("force").unwrap());
    }
}

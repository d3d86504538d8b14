//! Says what a deployment is to be like, and starts it.

use std::{sync::Arc, time::Duration};

use mongo_core::mongodb::{self, Client, bson::doc};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::{
    Error, FaultProxy, Member, Result, TestDeployment,
    access::{Access, Login, PASSWORD, USER},
    binary::{self, Place},
    deployment::{primary, settled},
    member::{POLL, hello},
    server::{Plan, Server},
    tls::{Tls, write_private},
    watchdog::Watchdog,
    wheel::version_matches,
};

/// What a [`TestDeployment`] is to be like; made by [`TestDeployment::standalone`] and
/// [`TestDeployment::replica_set`].
#[derive(Clone, Debug)]
#[must_use = "nothing runs before `start`"]
pub struct Builder {
    /// `None` for a standalone.
    set_of: Option<usize>,
    version: Option<String>,
    only: Option<Place>,
    login: Login,
    tls: bool,
    fault_proxies: bool,
    initiated: bool,
    cache_gb: f64,
    arguments: Vec<String>,
}

impl Builder {
    pub(crate) fn standalone() -> Self {
        Self {
            set_of: None,
            version: None,
            only: None,
            login: Login::No,
            tls: false,
            fault_proxies: false,
            initiated: true,
            cache_gb: 0.25,
            arguments: Vec::new(),
        }
    }

    pub(crate) fn replica_set(members: usize) -> Self {
        Self { set_of: Some(members), ..Self::standalone() }
    }

    /// Asks for a version: a line such as `6.0`, or one such as `6.0.27`. It goes before `MONGO_TESTKIT_VERSION`.
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = Some(version.into());
        self
    }

    /// Runs the servers in containers, whatever else there is. It goes before `MONGO_TESTKIT`.
    #[cfg(feature = "docker")]
    pub fn in_containers(mut self) -> Self {
        self.only = Some(Place::Docker);
        self
    }

    /// Turns authentication on, with a user of the role `root` whose password needs escaping in a connection string.
    pub fn with_auth(mut self) -> Self {
        self.login = Login::Root;
        self
    }

    /// Makes the servers accept nothing but TLS, with certificates made for the occasion.
    pub fn with_tls(mut self) -> Self {
        self.tls = true;
        self
    }

    /// Puts a [`FaultProxy`] before every member. Clients and the other members know each member by its proxy.
    pub fn with_fault_proxies(mut self) -> Self {
        self.fault_proxies = true;
        self
    }

    /// Leaves the members of a replica set as they start: not initiated, without a configuration. For tests that do that themselves;
    /// only [`Member::uri`](crate::Member::uri) works on them until then.
    pub fn uninitiated(mut self) -> Self {
        self.initiated = false;
        self
    }

    /// Adds an argument for mongod; one that takes a value is `--name=value`, or two calls.
    pub fn with_arg(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Sets the size of each server's storage cache in gigabytes; 0.25 by default, which is the least it takes.
    pub fn with_cache_gb(mut self, cache_gb: f64) -> Self {
        self.cache_gb = cache_gb;
        self
    }

    /// Starts the servers and returns when they can be used: a set has its primary, and every other member is a
    /// secondary.
    ///
    /// The first start on a machine may fetch a server.
    ///
    /// # Errors
    ///
    /// [`Error::NoServer`] when no server can be found or brought, [`Error::Server`] when one does not start,
    /// [`Error::Timeout`] when it takes too long, [`Error::Invalid`] for settings that cannot be, and the others of
    /// [`Error`] for what their names say. Whatever had been started is gone by then.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends what had been started, a moment later.
    pub async fn start(self) -> Result<TestDeployment> {
        let members = self.set_of.unwrap_or(1);
        if !(1..=MOST_MEMBERS).contains(&members) {
            return Err(Error::Invalid(format!("a test's replica set has 1 to {MOST_MEMBERS} members, not {members}")));
        }
        let plan = Arc::new(self.plan(members).await?);
        let servers = start_all(&plan).await?;
        let access = Access { login: plan.login, tls: plan.tls.clone(), replica_set: plan.replica_set.clone() };
        let anonymous = access.anonymous();
        let access = Arc::new(access);

        let mut all = Vec::new();
        for (index, server) in servers.into_iter().enumerate() {
            let proxy = match plan.fault_proxies {
                true => Some(FaultProxy::start(format!("127.0.0.1:{}", server.port())).await?),
                false => None,
            };
            all.push(Member::new(index, server, proxy, Arc::clone(&access)));
        }
        if let (Some(name), true) = (&access.replica_set, self.initiated) {
            initiate(&all, &anonymous, name).await?;
            settled(&all, &anonymous).await?;
        }
        if access.login == Login::Root && self.initiated {
            create_root(&all, &anonymous).await?;
        }
        if access.replica_set.is_some() && self.initiated {
            make_durable(&all, &access).await?;
        }
        let source = plan.program.source(version(&all, &access).await?);
        // Only an image can turn out to be something else than what was asked for.
        if let Some(wanted) = binary::wanted_version(self.version.as_deref())
            && !version_matches(source.version(), &wanted)
        {
            return Err(Error::NoServer(format!("{source} is not MongoDB {wanted}: let MONGO_TESTKIT_IMAGE name one that is")));
        }
        tracing::info!(%source, members, "a test deployment is up");
        Ok(TestDeployment::new(all, access, source, plan))
    }

    async fn plan(&self, members: usize) -> Result<Plan> {
        let program = binary::find(self.version.as_deref(), self.only).await?;
        let folder = tempfile::Builder::new()
            .prefix("mongo-testkit-")
            .tempdir()
            .map_err(Error::io("make a temporary folder (TMPDIR names another place)"))?;
        let watchdog = Watchdog::start(folder.path(), program.end_command())?;
        let tls = match self.tls {
            true => Some(Tls::generate(folder.path())?),
            false => None,
        };
        let key_file = match (self.set_of, self.login) {
            (Some(_), Login::Root) => {
                let path = folder.path().join("keyfile");
                write_private(&path, "what+the+members+of+a+set+know+each+other+by\n")?;
                Some(path)
            }
            _ => None,
        };
        // Its own name, so that no member of another test's set on a port that was this one's is taken for ours.
        let replica_set = self.set_of.map(|_| crate::unique_name("rs"));
        Ok(Plan {
            program,
            members,
            replica_set,
            login: self.login,
            key_file,
            tls,
            fault_proxies: self.fault_proxies,
            cache_gb: self.cache_gb,
            arguments: self.arguments.clone(),
            watchdog,
            folder,
        })
    }
}

/// Starts all members side by side.
async fn start_all(plan: &Arc<Plan>) -> Result<Vec<Server>> {
    let mut starting = JoinSet::new();
    for index in 0..plan.members {
        let plan = Arc::clone(plan);
        starting.spawn(async move { (index, Server::start(plan, index).await) });
    }
    let mut started = Vec::new();
    let mut problem = None;
    // Also after a problem: the others must have ended before the caller hears of it.
    while let Some(joined) = starting.join_next().await {
        match joined {
            Ok((index, Ok(server))) => started.push((index, server)),
            Ok((index, Err(error))) => {
                problem.get_or_insert(match error {
                    Error::Server(problem) if plan.members > 1 => Error::Server(format!("member {index}: {problem}")),
                    other => other,
                });
            }
            Err(error) => {
                problem.get_or_insert(Error::Server(format!("the start of a server was broken off: {error}")));
            }
        }
    }
    if let Some(problem) = problem {
        return Err(problem);
    }
    started.sort_by_key(|(index, _)| *index);
    Ok(started.into_iter().map(|(_, server)| server).collect())
}

/// Makes the servers one set, and its first member primary.
async fn initiate(members: &[Member], access: &Access, name: &str) -> Result<()> {
    let Some(first) = members.first() else { return Ok(()) };
    let hosts = members.iter().enumerate();
    let hosts: Vec<_> = hosts
        .map(|(index, member)| Ok(doc! { "_id": i32::try_from(index).unwrap_or_default(), "host": member.host_port() }))
        .collect::<Result<_>>()?;
    // Twice a second and two seconds: quick enough for tests, and slow enough for a machine that runs many of them.
    let settings = doc! { "heartbeatIntervalMillis": 500, "electionTimeoutMillis": 2000 };
    let command = doc! { "replSetInitiate": { "_id": name, "members": hosts, "settings": settings } };
    let client = first.direct_client(access).await?;
    client.database("admin").run_command(command).await.map_err(Error::command("initiating the replica set"))?;

    // A new client: one that met the server before its set existed believes for good that there are no sessions.
    let client = first.direct_client(access).await?;
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(10) {
        if hello(&client).await.is_some_and(|hello| hello.get_bool("isWritablePrimary").unwrap_or(false)) {
            break;
        }
        // It would stand for election by itself, after two seconds. Refused until the others know of the set, and
        // always where it needs a login; then the two seconds it is.
        let _ = timeout(Duration::from_millis(500), step_up(&client)).await;
        sleep(POLL).await;
    }
    Ok(())
}

async fn step_up(client: &Client) -> Result<(), mongodb::error::Error> {
    client.database("admin").run_command(doc! { "replSetStepUp": 1 }).await.map(|_| ())
}

/// Creates the root user through the exception for clients on the same machine, which ends with that.
async fn create_root(members: &[Member], access: &Access) -> Result<()> {
    let primary = primary(members, access, &[]).await?;
    let Some(member) = members.get(primary) else { return Ok(()) };
    let client = member.direct_client(access).await?;
    let mut command = doc! { "createUser": USER, "pwd": PASSWORD, "roles": ["root"] };
    if access.replica_set.is_some() {
        let all = i32::try_from(members.len()).unwrap_or(1);
        command.insert("writeConcern", doc! { "w": all, "wtimeout": 20_000 });
    }
    let created = client.database("admin").run_command(command).await;
    created.map(|_| ()).map_err(Error::command("creating the root user"))
}

/// Writes the set's birth to the disks: a member that was killed in its first tenth of a second would come back
/// without knowing of its set.
async fn make_durable(members: &[Member], access: &Access) -> Result<()> {
    let Some(member) = members.get(primary(members, access, &[]).await?) else { return Ok(()) };
    let admin = member.direct_client(access).await?.database("admin");
    // Journals are written in order, so this entry takes with it what every member knows of the set.
    let all = i32::try_from(members.len()).unwrap_or(1);
    let note = doc! {
        "appendOplogNote": 1,
        "data": { "msg": "a test deployment begins" },
        "writeConcern": { "w": all, "j": true, "wtimeout": 20_000 },
    };
    admin.run_command(note).await.map_err(Error::command("writing through the new set"))?;
    // Without a first checkpoint there is nothing that a recovery could apply the oplog to.
    let begin = Instant::now();
    loop {
        match admin.run_command(doc! { "fsync": 1 }).await {
            // Too early to say where a checkpoint is stable.
            Err(_) if begin.elapsed() < Duration::from_secs(10) => sleep(POLL).await,
            flushed => return flushed.map(|_| ()).map_err(Error::command("flushing the new set to disk")),
        }
    }
}

/// The version that the servers say themselves, which also shows that the way in is open.
async fn version(members: &[Member], access: &Access) -> Result<String> {
    let Some(first) = members.first() else { return Ok(String::new()) };
    let client = first.direct_client(access).await?;
    let answer = client.database("admin").run_command(doc! { "buildInfo": 1 }).await;
    let answer = answer.map_err(Error::command("asking for the server's version"))?;
    Ok(answer.get_str("version").unwrap_or("unknown").to_owned())
}

/// The most that can vote.
const MOST_MEMBERS: usize = 7;

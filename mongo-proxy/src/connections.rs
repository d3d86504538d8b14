//! The connections that there are, for whoever wants to see them.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use mongo_core::lock::lock;
use serde::Serialize;
use tokio::time::Instant;

use crate::{command::kind, rules::Who};

/// One client's connection.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ConnectionStatus {
    /// A number that no other connection of this proxy has had.
    pub id: u64,
    /// From where it comes.
    pub client: SocketAddr,
    /// The server that it goes on to.
    pub upstream: String,
    /// The name of its application, as it says.
    pub application: Option<String>,
    /// Who is logged in on it, as `database.user`.
    pub users: Vec<String>,
    /// For how long it has been there. In JSON: seconds.
    #[serde(rename = "open_seconds", with = "mongo_core::seconds")]
    pub open: Duration,
    /// Requests that have come on it.
    pub requests: u64,
    /// The command that is under way; `another` for one that is not known.
    pub command: Option<&'static str>,
}

/// What is known of a connection while it is there.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) id: u64,
    pub(crate) client: SocketAddr,
    upstream: String,
    opened: Instant,
    requests: AtomicU64,
    /// The place of the command that is under way among those that are known.
    command: AtomicUsize,
    of: Mutex<Of>,
}

/// Who it is.
#[derive(Debug, Default)]
struct Of {
    application: Option<String>,
    users: Vec<String>,
}

impl Connection {
    /// Notes who it is.
    pub(crate) fn is_of(&self, who: &Who) {
        let mut of = lock(&self.of);
        of.application.clone_from(&who.application);
        of.users.clone_from(&who.users);
    }

    /// Notes that a request has come: a command of this number.
    pub(crate) fn begins(&self, number: usize) {
        self.requests.fetch_add(1, Relaxed);
        self.command.store(number, Relaxed);
    }

    /// Notes that nothing is under way.
    pub(crate) fn rests(&self) {
        self.command.store(kind::NOTHING, Relaxed);
    }

    fn status(&self) -> ConnectionStatus {
        let of = lock(&self.of);
        ConnectionStatus {
            id: self.id,
            client: self.client,
            upstream: self.upstream.clone(),
            application: of.application.clone(),
            users: of.users.clone(),
            open: self.opened.elapsed(),
            requests: self.requests.load(Relaxed),
            command: kind::name(self.command.load(Relaxed)),
        }
    }
}

/// All that there are.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    open: Mutex<BTreeMap<u64, Arc<Connection>>>,
    ever: AtomicU64,
}

impl Connections {
    /// Takes one in, unless there are so many already.
    pub(crate) fn open(&self, client: SocketAddr, upstream: &str, at_most: usize) -> Option<Arc<Connection>> {
        let mut open = lock(&self.open);
        if open.len() >= at_most {
            return None;
        }
        let connection = Arc::new(Connection {
            id: self.ever.fetch_add(1, Relaxed) + 1,
            client,
            upstream: upstream.to_owned(),
            opened: Instant::now(),
            requests: AtomicU64::new(0),
            command: AtomicUsize::new(kind::NOTHING),
            of: Mutex::default(),
        });
        open.insert(connection.id, Arc::clone(&connection));
        Some(connection)
    }

    /// Forgets one.
    pub(crate) fn close(&self, id: u64) {
        lock(&self.open).remove(&id);
    }

    pub(crate) fn number(&self) -> usize {
        lock(&self.open).len()
    }

    /// How many there have been.
    pub(crate) fn ever(&self) -> u64 {
        self.ever.load(Relaxed)
    }

    pub(crate) fn list(&self) -> Vec<ConnectionStatus> {
        let open: Vec<_> = lock(&self.open).values().cloned().collect();
        open.iter().map(|connection| connection.status()).collect()
    }
}

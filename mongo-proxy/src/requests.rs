//! The request log.
//!
//! What is logged are names: of commands, namespaces, applications and users. No value of any document is ever in it.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use mongo_core::lock::lock;
use serde::{Deserialize, Serialize};

/// Which requests are logged. In the log of the host (by `tracing`, target `mongo_proxy::requests`, level `INFO`), and the last 200 in
/// [`ProxyHandle::requests`](crate::ProxyHandle::requests).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct RequestLog {
    /// Of all requests that read or write one in so many; 0 for none. Default 0.
    pub one_in: u64,
    /// Those that took longer than this, all of them. Default: none. In a file: seconds, under `slower_than`.
    #[serde(with = "optional_seconds")]
    pub slower_than: Option<Duration>,
    /// Those that were refused, and those whose connection failed before they were answered. Default true.
    pub refused: bool,
    /// Leaves out who it was: the connection, the address, the user and the application. Default false.
    pub hides_who: bool,
}

impl Default for RequestLog {
    fn default() -> Self {
        Self { one_in: 0, slower_than: None, refused: true, hides_who: false }
    }
}

/// A request that was logged.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LoggedRequest {
    /// When its last reply was passed on. In JSON: seconds since 1970.
    #[serde(rename = "at_seconds", serialize_with = "since_epoch")]
    pub at: SystemTime,
    /// The number of its connection.
    pub connection: Option<u64>,
    /// From where it came.
    pub client: Option<SocketAddr>,
    /// The name of the application, as it says.
    pub application: Option<String>,
    /// Who is logged in, as `database.user`.
    pub users: Vec<String>,
    /// What was asked for.
    pub command: String,
    /// Of what: `database.collection`, or the database.
    pub namespace: String,
    /// From its first byte to that of its last reply, with what it waited for rules. In JSON: seconds.
    #[serde(rename = "seconds", with = "mongo_core::seconds")]
    pub took: Duration,
    /// Bytes that came of the client, as they came.
    pub request_bytes: usize,
    /// Bytes that came of the server; 0 if its connection failed.
    pub reply_bytes: usize,
    /// Why it was refused: `denied`, `limited`, `out_of_time`, `draining` or `certificate`; nothing if it was passed on.
    pub refused: Option<&'static str>,
    /// How its connection failed before it was answered.
    pub failed: Option<String>,
    /// The rule that refused it, or those that had something to do with it.
    pub rules: Vec<String>,
}

/// The log, and what of it is kept.
#[derive(Debug)]
pub(crate) struct Requests {
    settings: RequestLog,
    seen: AtomicU64,
    last: Mutex<VecDeque<LoggedRequest>>,
}

impl Requests {
    pub(crate) fn new(settings: RequestLog) -> Self {
        Self { settings, seen: AtomicU64::new(0), last: Mutex::default() }
    }

    /// Whether this one is logged; it is counted for the sample with that.
    pub(crate) fn wants(&self, took: Duration, has_failed: bool) -> bool {
        let is_sample = self.settings.one_in > 0 && self.seen.fetch_add(1, Relaxed).is_multiple_of(self.settings.one_in);
        is_sample || (has_failed && self.settings.refused) || self.settings.slower_than.is_some_and(|slow| took > slow)
    }

    pub(crate) fn log(&self, mut request: LoggedRequest) {
        if self.settings.hides_who {
            (request.connection, request.client, request.application) = (None, None, None);
            request.users.clear();
        }
        tracing::info!(
            target: "mongo_proxy::requests",
            connection = request.connection,
            client = request.client.map(tracing::field::display),
            application = request.application,
            users = ?request.users,
            command = request.command,
            namespace = request.namespace,
            seconds = request.took.as_secs_f64(),
            request_bytes = request.request_bytes,
            reply_bytes = request.reply_bytes,
            refused = request.refused,
            failed = request.failed,
            rules = ?request.rules,
            "a request"
        );
        let mut last = lock(&self.last);
        if last.len() >= KEPT {
            last.pop_front();
        }
        last.push_back(request);
    }

    /// The last of them, the oldest first.
    pub(crate) fn last(&self) -> Vec<LoggedRequest> {
        lock(&self.last).iter().cloned().collect()
    }
}

fn since_epoch<S: serde::Serializer>(at: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64())
}

mod optional_seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Seconds(#[serde(with = "mongo_core::seconds")] Duration);

    pub(super) fn serialize<S: Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        time.map(Seconds).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<Seconds>::deserialize(deserializer)?.map(|Seconds(time)| time))
    }
}

/// So many requests are kept for who asks for them.
const KEPT: usize = 200;

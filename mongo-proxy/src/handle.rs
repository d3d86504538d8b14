//! A running proxy, from outside.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use mongo_core::Result;
use serde::Serialize;

use crate::{
    connections::ConnectionStatus,
    proxy::Shared,
    requests::LoggedRequest,
    rules::{Rule, Rules},
};

/// A running proxy, from outside. Clones are the same.
#[derive(Clone, Debug)]
pub struct ProxyHandle(pub(crate) Arc<Shared>);

impl ProxyHandle {
    /// The connections of clients that there are, the oldest first.
    pub fn connections(&self) -> Vec<ConnectionStatus> {
        self.0.connections.list()
    }

    /// What has happened since it was there.
    pub fn statistics(&self) -> Statistics {
        let shared = &self.0;
        Statistics {
            running: shared.now(),
            is_draining: shared.is_draining(),
            connections: shared.connections.number(),
            connections_ever: shared.connections.ever(),
            turned_away: shared.instruments.turned_away.value(),
            requests: shared.instruments.requests_ever(),
            refused: shared.instruments.refused().collect(),
            malformed: shared.instruments.malformed().collect(),
            large_messages_bytes: shared.memory_taken(),
            members: shared.members().map(|members| members.all().into_iter().collect()).unwrap_or_default(),
        }
    }

    /// The requests that were logged last, the oldest first; 200 at most.
    pub fn requests(&self) -> Vec<LoggedRequest> {
        self.0.requests.last()
    }

    /// The rules that are in force, and what has become of the requests that each was about.
    pub fn rules(&self) -> RulesStatus {
        let book = self.0.rules();
        let status = |rule: &Arc<crate::rules::CheckedRule>| RuleStatus {
            rule: rule.rule.clone(),
            matched: rule.tally.matched.value(),
            waited: rule.tally.waited.value(),
            refused: rule.tally.refused.value(),
            would_be_held_up: rule.tally.observed.value(),
        };
        RulesStatus { version: book.version, rules: book.rules.iter().map(status).collect() }
    }

    /// Puts other rules in force, all at once, and gives their version. Requests that were judged already go by the old ones. Rules that are as they were
    /// keep what they have counted, and their limits go on.
    ///
    /// # Errors
    /// `InvalidInput` for rules that are not fit, as [`Rules::check`]; those that were there stay in force then.
    pub fn set_rules(&self, rules: &Rules) -> Result<u64> {
        self.0.set_rules(rules)
    }

    /// From now on nothing new is begun: who asks is told that the proxy is about to stop (91 `ShutdownInProgress`), by which a driver looks for another
    /// way. Cursors and transactions go on, and connections are taken, until the proxy is cancelled. There is no way back.
    pub fn drain(&self) {
        self.0.drain();
    }

    /// Reads the files of certificates again, for the connections to come: that which clients are shown, those by which the server is known, and that which
    /// it is shown. Without any nothing happens.
    ///
    /// # Errors
    /// `InvalidInput` for a file that is not fit; what there was on that side stays then.
    #[cfg(feature = "tls")]
    pub fn reload_certificates(&self) -> Result<()> {
        self.0.connecting.as_ref().map_or(Ok(()), crate::tls::Connecting::reload)?;
        self.0.listening.as_ref().map_or(Ok(()), crate::tls::Listening::reload)
    }
}

/// What has happened since a proxy was there.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Statistics {
    /// For how long it has been there. In JSON: seconds.
    #[serde(rename = "running_seconds", with = "mongo_core::seconds")]
    pub running: Duration,
    /// Whether nothing new is begun any more.
    pub is_draining: bool,
    /// Connections of clients now.
    pub connections: usize,
    /// And all that there have been.
    pub connections_ever: u64,
    /// Connections for which there was no place.
    pub turned_away: u64,
    /// Requests that were served or refused.
    pub requests: u64,
    /// Requests that were refused, by why.
    pub refused: BTreeMap<&'static str, u64>,
    /// What was no message, by why.
    pub malformed: BTreeMap<&'static str, u64>,
    /// What messages under way take of the memory for large ones.
    pub large_messages_bytes: usize,
    /// The address that clients see, by that of each member of the replica set; empty before a single server.
    pub members: BTreeMap<String, String>,
}

/// The rules that are in force.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RulesStatus {
    /// 1 for those from the beginning, and one more for each time that others were put in force.
    pub version: u64,
    /// In their order.
    pub rules: Vec<RuleStatus>,
}

impl RulesStatus {
    /// The rules alone, to be put in force again.
    pub fn to_rules(&self) -> Rules {
        Rules::new(self.rules.iter().map(|status| status.rule.clone()))
    }
}

/// A rule, and what has become of the requests that it was about.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RuleStatus {
    /// The rule.
    pub rule: Rule,
    /// Requests that it was about.
    pub matched: u64,
    /// Those that it has let wait.
    pub waited: u64,
    /// Those that it has refused.
    pub refused: u64,
    /// Those that it would have refused or let wait, if it did not only observe.
    pub would_be_held_up: u64,
}

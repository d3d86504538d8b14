//! Rules: who may do what, how often, and for how long.

mod book;
mod limits;
#[cfg(test)]
mod tests;

use std::time::Duration;

use mongo_core::{Error, Result, rate::Rate};
use serde::{Deserialize, Serialize};

pub use crate::command::kind::Access;
pub(crate) use book::{CheckedRule, Held, Refused, RuleBook, Ruling, Step, Who, wait_for_rate, wait_for_slot};

/// What clients may do, as data.
///
/// A request goes through the rules from the first on. The first that it [matches](Match) as a whole decides, and those behind it are not asked; if there is
/// none, it is let through. Nothing is asked about what begins a connection, goes on with something or ends it: `hello`, `ping`, `saslStart`,
/// `saslContinue`, `authenticate`, `logout`, `getMore`, `killCursors`, `commitTransaction`, `abortTransaction`, `endSessions`, `killSessions` and
/// `refreshSessions` are always let through.
///
/// ```
/// use mongo_proxy::Rules;
///
/// let rules = Rules::from_json(
///     r#"{ "rules": [
///         { "name": "nobody drops", "match": { "commands": ["drop", "dropDatabase"] }, "actions": [{ "deny": "unauthorized" }] },
///         { "name": "reports", "match": { "applications": ["report*"], "access": "read" },
///           "actions": [{ "limit_concurrency": { "at_once": 2, "wait_at_most": 1.5 } }, { "clamp_max_time": 30 }] }
///     ] }"#,
/// )?;
/// assert_eq!(rules.rules[1].name, "reports");
/// # Ok::<(), mongo_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Rules {
    /// The rules, in the order in which they are asked.
    pub rules: Vec<Rule>,
}

impl Rules {
    /// These rules.
    pub fn new(rules: impl IntoIterator<Item = Rule>) -> Self {
        Self { rules: rules.into_iter().collect() }
    }

    /// Reads rules from JSON, and checks them.
    ///
    /// # Errors
    /// `InvalidInput` for what is no JSON, has a field that there is not, or is refused by [`check`](Self::check); the message says where.
    pub fn from_json(text: &str) -> Result<Self> {
        let rules: Self = serde_json::from_str(text)
            .map_err(|error| Error::invalid("the rules cannot be read").with_context("why", &error).with_source(error))?;
        rules.check()?;
        Ok(rules)
    }

    /// Checks that each rule can be meant as it stands.
    ///
    /// # Errors
    /// `InvalidInput`, with the name of the rule and what is wrong with it.
    pub fn check(&self) -> Result<()> {
        RuleBook::new(self, 0, None, &mongo_core::metrics::NoMetrics).map(drop)
    }
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Rule {
    /// Its name: in refusals, in the log, and the label in metrics. No other rule has it.
    pub name: String,
    /// Which requests it is about. Default: all.
    #[serde(rename = "match", default, skip_serializing_if = "Match::is_everything")]
    pub matches: Match,
    /// What is done with them, in this order.
    pub actions: Vec<Action>,
    /// Nothing is done: it is counted what would have been, and the next rules are asked. Default false.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub observe_only: bool,
}

impl Rule {
    /// A rule about all requests.
    pub fn new(name: impl Into<String>, actions: impl IntoIterator<Item = Action>) -> Self {
        Self { name: name.into(), matches: Match::default(), actions: actions.into_iter().collect(), observe_only: false }
    }

    /// About these requests.
    #[must_use]
    pub fn with_match(mut self, matches: Match) -> Self {
        self.matches = matches;
        self
    }

    /// Only counts what it would do.
    #[must_use]
    pub fn observing_only(mut self) -> Self {
        self.observe_only = true;
        self
    }
}

/// Which requests a rule is about: those for which every field that is set holds. Of a list one entry is enough.
///
/// In names `*` stands for any run of characters, `\*` for a star.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Match {
    /// Commands, as the server calls them: `["find", "aggregate"]`. Names that a command has beside its own (`findandmodify`) are meant with it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub commands: Vec<String>,
    /// Patterns over the namespaces that a request touches, also in the stages of a pipeline: `["shop.*", "*.secrets"]`. `shop` is `shop.*`. What
    /// touches a database as a whole (`dropDatabase`) touches every collection of it.
    ///
    /// A rule that matches only some of the namespaces of a request denies it, or holds it up, all the same; but it decides nothing, and the next
    /// rules are asked. It allows nothing then.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<String>,
    /// Patterns over who is logged in, as `database.user` (the `_id` in `admin.system.users`): `["admin.report*", "$external.*"]`. The server says
    /// who that is. Who is not logged in is nobody.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub users: Vec<String>,
    /// Patterns over the application's name (`appName`) in the handshake. Whoever connects can say what they like there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub applications: Vec<String>,
    /// Networks that the client's address is in: `["10.0.0.0/8", "::1/128", "192.0.2.7"]`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<String>,
    /// Whether it reads or writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access: Option<Access>,
    /// Whether it is part of a transaction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_transaction: Option<bool>,
}

impl Match {
    fn is_everything(&self) -> bool {
        *self == Self::default()
    }

    /// Only these commands.
    #[must_use]
    pub fn commands<T: Into<String>>(mut self, commands: impl IntoIterator<Item = T>) -> Self {
        self.commands = commands.into_iter().map(Into::into).collect();
        self
    }

    /// Only these namespaces.
    #[must_use]
    pub fn namespaces<T: Into<String>>(mut self, patterns: impl IntoIterator<Item = T>) -> Self {
        self.namespaces = patterns.into_iter().map(Into::into).collect();
        self
    }

    /// Only these users.
    #[must_use]
    pub fn users<T: Into<String>>(mut self, patterns: impl IntoIterator<Item = T>) -> Self {
        self.users = patterns.into_iter().map(Into::into).collect();
        self
    }

    /// Only these applications.
    #[must_use]
    pub fn applications<T: Into<String>>(mut self, patterns: impl IntoIterator<Item = T>) -> Self {
        self.applications = patterns.into_iter().map(Into::into).collect();
        self
    }

    /// Only clients of these networks.
    #[must_use]
    pub fn networks<T: Into<String>>(mut self, networks: impl IntoIterator<Item = T>) -> Self {
        self.networks = networks.into_iter().map(Into::into).collect();
        self
    }

    /// Only reads, or only writes.
    #[must_use]
    pub fn access(mut self, access: Access) -> Self {
        self.access = Some(access);
        self
    }

    /// Only what is part of a transaction, or only what is not.
    #[must_use]
    pub fn in_transaction(mut self, is: bool) -> Self {
        self.in_transaction = Some(is);
        self
    }
}

/// What is done with a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Action {
    /// Lets it through, before later rules are asked. In a file: `"allow"`.
    Allow,
    /// Refuses it. Drivers do not try it again. In a file: `{"deny": "unauthorized"}`.
    Deny(Denial),
    /// Lets it wait for so long. In a file, in seconds: `{"delay": 0.05}`.
    Delay(#[serde(with = "mongo_core::seconds")] Duration),
    /// Lets so many through in a time.
    LimitRate(RateRule),
    /// Lets so many be under way at once.
    LimitConcurrency(ConcurrencyRule),
    /// Gives it at most so much time on the server (`maxTimeMS`), also if it asks for more or for no limit. In a file, in seconds: `{"clamp_max_time": 5}`.
    ClampMaxTime(#[serde(with = "mongo_core::seconds")] Duration),
    /// Gives it this comment, if it has none: it is in the server's log, in its profiler and in `$currentOp`. In a file: `{"tag": "by the proxy"}`.
    Tag(String),
}

/// How a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Denial {
    /// 13 `Unauthorized`: who asks may not.
    Unauthorized,
    /// 411 `QueryRejectedBySettings`: nobody may.
    QueryRejected,
    /// 371 `UserWritesBlocked`: not now, nothing is written.
    ReadOnly,
}

/// Lets so many requests through in a time. In a file: `{"limit_rate": {"per_second": 50, "burst": 100, "key": "client", "wait_at_most": 0.2}}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct RateRule {
    /// So many a second, in the long run.
    pub per_second: f64,
    /// So many at once, after a quiet time. Default 1.
    #[serde(default = "one")]
    pub burst: u32,
    /// Of whom each has such a limit. Default: all share one.
    #[serde(default)]
    pub key: Key,
    /// How long a request waits for its turn before it is refused; nor longer than its `maxTimeMS`. Default 0; at most an hour.
    #[serde(default, with = "mongo_core::seconds")]
    pub wait_at_most: Duration,
}

impl RateRule {
    /// So many a second, and `burst` at once; all share the limit, and nobody waits.
    pub fn new(per_second: f64, burst: u32) -> Self {
        Self { per_second, burst, key: Key::All, wait_at_most: Duration::ZERO }
    }

    /// Each of these has such a limit.
    #[must_use]
    pub fn keyed(mut self, key: Key) -> Self {
        self.key = key;
        self
    }

    /// How long a request waits for its turn.
    #[must_use]
    pub fn waiting(mut self, at_most: Duration) -> Self {
        self.wait_at_most = at_most;
        self
    }

    fn rate(&self) -> Rate {
        Rate::new(self.per_second, self.burst)
    }
}

/// Lets so many requests be under way at once, until their last reply. In a file: `{"limit_concurrency": {"at_once": 4, "key": "user", "max_waiting": 100, "wait_at_most": 1}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct ConcurrencyRule {
    /// So many at once.
    pub at_once: u32,
    /// Of whom each has such a limit. Default: all share one.
    #[serde(default)]
    pub key: Key,
    /// So many may wait; more are refused at once. Default 1000.
    #[serde(default = "thousand")]
    pub max_waiting: u32,
    /// How long a request waits for a place before it is refused; nor longer than its `maxTimeMS`. Default 0; at most an hour.
    #[serde(default, with = "mongo_core::seconds")]
    pub wait_at_most: Duration,
}

impl ConcurrencyRule {
    /// So many at once; all share the limit, and nobody waits.
    pub fn new(at_once: u32) -> Self {
        Self { at_once, key: Key::All, max_waiting: thousand(), wait_at_most: Duration::ZERO }
    }

    /// Each of these has such a limit.
    #[must_use]
    pub fn keyed(mut self, key: Key) -> Self {
        self.key = key;
        self
    }

    /// How long a request waits for a place.
    #[must_use]
    pub fn waiting(mut self, at_most: Duration) -> Self {
        self.wait_at_most = at_most;
        self
    }
}

/// Of whom each has a limit of its own.
///
/// There are at most 10,000 limits of a rule at once, and what comes when all of them are in use shares one more. Limits that nobody has used for long
/// are forgotten; that gives nobody more than a fresh one would.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Key {
    /// Nobody: all share one.
    #[default]
    All,
    /// Each client's address; of IPv6 each network of 64 bits.
    Client,
    /// Each user, and all that are not logged in together.
    User,
    /// Each application's name.
    Application,
    /// Each namespace; of several that a request touches the first that it names.
    Namespace,
}

fn one() -> u32 {
    1
}

fn thousand() -> u32 {
    1000
}

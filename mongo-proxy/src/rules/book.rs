//! Rules that were checked, and what they have seen.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use mongo_core::{Error, NamespacePattern, Result, TextPattern, metrics::MetricsSink};
use tokio::sync::OwnedSemaphorePermit;

use super::{
    Access, Action, ConcurrencyRule, Denial, Key, Match, RateRule, Rule, Rules,
    limits::{NoSlot, Rates, Slots, Turn},
};
use crate::{
    command::{
        Command, Transaction,
        kind::{self, Kind},
        touched::Touched,
    },
    instruments::Count,
};

/// Rules in force.
#[derive(Debug)]
pub(crate) struct RuleBook {
    /// 1 for the first, and one more for each after them.
    pub(crate) version: u64,
    pub(crate) rules: Vec<Arc<CheckedRule>>,
    needs_namespaces: bool,
}

/// A rule in force.
#[derive(Debug)]
pub(crate) struct CheckedRule {
    pub(crate) rule: Rule,
    matcher: Matcher,
    steps: Vec<Step>,
    pub(crate) tally: Tally,
}

/// What has become of the requests that a rule was about.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) matched: Count,
    pub(crate) waited: Count,
    pub(crate) refused: Count,
    /// What a rule that only observes would have refused or held up.
    pub(crate) observed: Count,
}

/// What a rule does, one after the other.
#[derive(Debug)]
pub(crate) enum Step {
    Deny(Denial),
    Delay(Duration),
    Rate(RateRule, Rates),
    Slot(ConcurrencyRule, Slots),
    ClampMaxTime(Duration),
    Tag(String),
}

/// Who asks.
#[derive(Clone, Debug)]
pub(crate) struct Who {
    pub(crate) address: IpAddr,
    pub(crate) application: Option<String>,
    /// As `database.user`.
    pub(crate) users: Vec<String>,
}

/// A request, as rules see it.
#[derive(Debug)]
pub(crate) struct Facts<'a> {
    command: &'a Command<'a>,
    access: Option<Access>,
    touched: Touched,
    who: &'a Who,
}

/// What is to be done with a request.
#[derive(Debug, Default)]
pub(crate) struct Ruling {
    /// The rules that have something to do, and the key of each limit of theirs, in the order of their steps.
    pub(crate) rules: Vec<(Arc<CheckedRule>, Vec<String>)>,
    /// What rules that only observe have counted as under way.
    pub(crate) observed: Vec<OwnedSemaphorePermit>,
    /// The longest that the client lets the server work.
    pub(crate) max_time: Option<Duration>,
}

/// What a request holds as long as it is under way.
#[derive(Debug, Default)]
pub(crate) struct Held {
    pub(crate) slots: Vec<OwnedSemaphorePermit>,
    /// Its turns at rates, which are given back if it is not passed on.
    pub(crate) turns: Vec<Turn>,
}

impl Held {
    /// It is passed on.
    pub(crate) fn passes_on(&mut self) {
        for turn in self.turns.drain(..) {
            turn.used();
        }
    }
}

/// Why a request is not passed on, and the rule by which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    Denied(Denial, String),
    /// With the time after which it is welcome again, if that is known.
    Limited(Option<Duration>, String),
    /// The client's own time is over.
    OutOfTime(String),
    /// The proxy is about to stop. With the label by which drivers try a write or a transaction again that has not been begun.
    Draining(Option<&'static str>),
    /// Through a connection of the proxy's own nobody can show a certificate.
    Certificate,
}

impl Refused {
    /// As it is called in metrics and in the log.
    pub(crate) fn as_str(&self) -> &'static str {
        match self {
            Self::Denied(..) => "denied",
            Self::Limited(..) => "limited",
            Self::OutOfTime(_) => "out_of_time",
            Self::Draining(_) => "draining",
            Self::Certificate => "certificate",
        }
    }
}

impl RuleBook {
    /// Checks rules. Those that were there before, and are the same, keep what they have seen and whom they hold.
    pub(crate) fn new(rules: &Rules, version: u64, before: Option<&Self>, metrics: &dyn MetricsSink) -> Result<Self> {
        let mut names = BTreeSet::new();
        let mut checked = Vec::with_capacity(rules.rules.len());
        for rule in &rules.rules {
            let wrong = |error: Error| error.with_context("rule", rule.name.escape_debug());
            if !names.insert(&rule.name) {
                return Err(wrong(Error::invalid("two rules have the same name")));
            }
            let same = before.and_then(|before| before.rules.iter().find(|known| known.rule == *rule));
            checked.push(match same {
                Some(same) => Arc::clone(same),
                None => Arc::new(CheckedRule::new(rule, metrics).map_err(wrong)?),
            });
        }
        let needs_namespaces = checked.iter().any(|rule| rule.needs_namespaces());
        Ok(Self { version, rules: checked, needs_namespaces })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Whether some of them change what is passed on.
    pub(crate) fn rewrites(&self) -> bool {
        self.rules.iter().any(|rule| rule.steps.iter().any(|step| matches!(step, Step::ClampMaxTime(_) | Step::Tag(_))))
    }

    /// Whether it must be known which namespaces a request touches.
    pub(crate) fn needs_namespaces(&self) -> bool {
        self.needs_namespaces
    }

    /// What of a request the rules have to know.
    pub(crate) fn facts<'a>(&self, command: &'a Command<'a>, of_bulk_write: &[u8], who: &'a Who) -> Facts<'a> {
        let touched = if self.needs_namespaces { Touched::by(command, of_bulk_write) } else { Touched::default() };
        Facts { command, access: command.access(), touched, who }
    }

    /// Goes through the rules.
    pub(crate) fn rule(&self, facts: &Facts<'_>, now: Duration) -> Ruling {
        let mut ruling = Ruling { max_time: facts.command.max_time, ..Ruling::default() };
        if facts.command.is_always_let_through() {
            return ruling;
        }
        for rule in &self.rules {
            let matched = rule.matcher.matches(facts);
            if matched == Matched::No {
                continue;
            }
            rule.tally.matched.add_one();
            if rule.rule.observe_only {
                rule.observe(facts, now, &mut ruling.observed);
                continue;
            }
            let keys = rule.steps.iter().filter_map(|step| Some(facts.key(step.key()?))).collect();
            ruling.rules.push((Arc::clone(rule), keys));
            let denies = rule.steps.iter().any(|step| matches!(step, Step::Deny(_)));
            if matched == Matched::Whole || denies {
                break;
            }
        }
        ruling
    }
}

impl CheckedRule {
    fn new(rule: &Rule, metrics: &dyn MetricsSink) -> Result<Self> {
        if rule.name.trim().is_empty() || rule.name.len() > LONGEST_NAME || rule.name.chars().any(char::is_control) {
            return Err(Error::invalid("a rule needs a name of 1 to 100 letters"));
        }
        if rule.actions.is_empty() {
            return Err(Error::invalid("a rule without an action does nothing: say \"allow\", or what else is meant"));
        }
        let kinds: Vec<_> = rule.actions.iter().map(std::mem::discriminant).collect();
        if (1..kinds.len()).any(|at| kinds[..at].contains(&kinds[at])) {
            return Err(Error::invalid("a rule does the same thing twice"));
        }
        let decides = rule.actions.iter().any(|action| matches!(action, Action::Allow | Action::Deny(_)));
        if decides && rule.actions.len() > 1 {
            return Err(Error::invalid("a rule that allows or denies does nothing else"));
        }
        let count = |outcome: &str| {
            let help = "Requests that a rule was about, by what has become of them.";
            let labels = [("rule", rule.name.as_str()), ("outcome", outcome)];
            Count::new(metrics, "mongo_proxy_rule_requests_total", help, &labels)
        };
        let (matched, waited) = (count("matched"), count("waited"));
        let (refused, observed) = (count("refused"), count("would_be_held_up"));
        Ok(Self {
            matcher: Matcher::new(&rule.matches)?,
            steps: rule.actions.iter().filter_map(|action| Step::new(action).transpose()).collect::<Result<_>>()?,
            tally: Tally { matched, waited, refused, observed },
            rule: rule.clone(),
        })
    }

    pub(crate) fn steps(&self) -> &[Step] {
        &self.steps
    }

    fn needs_namespaces(&self) -> bool {
        !self.matcher.namespaces.is_empty() || self.steps.iter().any(|step| step.key() == Some(Key::Namespace))
    }

    /// Counts what it would do.
    fn observe(&self, facts: &Facts<'_>, now: Duration, held: &mut Vec<OwnedSemaphorePermit>) {
        let mut would_hold_up = false;
        for step in &self.steps {
            would_hold_up |= match step {
                Step::Deny(_) | Step::Delay(_) => true,
                Step::Rate(rule, rates) => match rates.admit(&facts.key(rule.key), now, rule.wait_at_most) {
                    Ok((wait, turn)) => {
                        turn.used();
                        !wait.is_zero()
                    }
                    Err(_) => true,
                },
                Step::Slot(rule, slots) => match slots.try_take(&facts.key(rule.key), now) {
                    Some(permit) => {
                        held.push(permit);
                        false
                    }
                    None => true,
                },
                Step::ClampMaxTime(_) | Step::Tag(_) => false,
            };
        }
        if would_hold_up {
            self.tally.observed.add_one();
        }
    }
}

impl Step {
    /// Nothing, for an action that needs nothing to be done.
    fn new(action: &Action) -> Result<Option<Self>> {
        let is_wait = |time: Duration| time <= LONGEST_WAIT;
        let wait = || Error::invalid("nobody waits for more than an hour");
        Ok(match action {
            Action::Allow => None,
            Action::Deny(denial) => Some(Self::Deny(*denial)),
            Action::Delay(time) if is_wait(*time) => Some(Self::Delay(*time)),
            Action::LimitRate(rule) if is_wait(rule.wait_at_most) => {
                rule.rate().check()?;
                Some(Self::Rate(rule.clone(), Rates::new(rule.rate())))
            }
            Action::LimitConcurrency(rule) if is_wait(rule.wait_at_most) => {
                if rule.at_once == 0 {
                    return Err(Error::invalid("of which none may be under way is denied: say so"));
                }
                Some(Self::Slot(rule.clone(), Slots::new(rule.at_once, rule.max_waiting)))
            }
            Action::Delay(_) | Action::LimitRate(_) | Action::LimitConcurrency(_) => return Err(wait()),
            Action::ClampMaxTime(time) => {
                let milliseconds = i32::try_from(time.as_millis()).ok().filter(|time| *time > 0);
                milliseconds.ok_or_else(|| Error::invalid("a time on the server lies between a millisecond and 24 days"))?;
                Some(Self::ClampMaxTime(*time))
            }
            Action::Tag(comment) if (1..=LONGEST_COMMENT).contains(&comment.len()) => Some(Self::Tag(comment.clone())),
            Action::Tag(_) => return Err(Error::invalid("a comment is a text of 1 to 1000 bytes")),
        })
    }

    fn key(&self) -> Option<Key> {
        match self {
            Self::Rate(rule, _) => Some(rule.key),
            Self::Slot(rule, _) => Some(rule.key),
            _ => None,
        }
    }
}

impl Ruling {
    /// Whether there is nothing to be done.
    pub(crate) fn is_pass(&self) -> bool {
        self.rules.is_empty()
    }

    /// The shortest time on the server, and the first comment, that the rules give; no time if the client wants it to be shorter itself.
    pub(crate) fn rewriting(&self) -> (Option<Duration>, Option<&str>) {
        let (mut clamp, mut comment) = (None::<Duration>, None);
        for step in self.rules.iter().flat_map(|(rule, _)| rule.steps()) {
            match step {
                Step::ClampMaxTime(time) => clamp = Some(clamp.map_or(*time, |clamp| clamp.min(*time))),
                Step::Tag(text) => comment = comment.or(Some(text.as_str())),
                _ => {}
            }
        }
        (clamp.filter(|clamp| self.max_time.is_none_or(|asked| asked > *clamp)), comment)
    }
}

/// Takes a turn at a rate, and says how long that has to be waited for: no longer than a while, nor than what is left of the client's own time.
pub(crate) fn wait_for_rate(
    rates: &Rates,
    key: &str,
    now: Duration,
    patience: Duration,
    left: Option<Duration>,
    name: &str,
) -> std::result::Result<(Duration, Turn), Refused> {
    rates.admit(key, now, patience.min(left.unwrap_or(Duration::MAX))).map_err(|wait| {
        if wait <= patience { Refused::OutOfTime(name.to_owned()) } else { Refused::Limited(Some(wait), name.to_owned()) }
    })
}

/// As [`wait_for_rate`], for a place among those under way; and says whether it had to wait.
pub(crate) async fn wait_for_slot(
    slots: &Slots,
    key: &str,
    now: Duration,
    patience: Duration,
    left: Option<Duration>,
    name: &str,
) -> std::result::Result<(OwnedSemaphorePermit, bool), Refused> {
    let least = patience.min(left.unwrap_or(Duration::MAX));
    slots.take(key, now, least).await.map_err(|why| {
        if why == NoSlot::Late && least < patience {
            Refused::OutOfTime(name.to_owned())
        } else {
            Refused::Limited(None, name.to_owned())
        }
    })
}

impl Facts<'_> {
    fn key(&self, key: Key) -> String {
        match key {
            Key::All => String::new(),
            Key::Client => match self.who.address {
                IpAddr::V4(address) => address.to_string(),
                // A network of 64 bits is one customer's, as a rule.
                IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).to_string(),
            },
            Key::User => self.who.users.first().cloned().unwrap_or_default(),
            Key::Application => self.who.application.clone().unwrap_or_default(),
            Key::Namespace => self.touched.first.clone(),
        }
    }
}

/// How much of a request a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Matched {
    No,
    /// Of some of its namespaces or users.
    Part,
    Whole,
}

#[derive(Debug)]
struct Matcher {
    commands: Vec<String>,
    namespaces: Vec<NamespacePattern>,
    users: Vec<TextPattern>,
    applications: Vec<TextPattern>,
    networks: Vec<IpNet>,
    access: Option<Access>,
    in_transaction: Option<bool>,
}

impl Matcher {
    fn new(matches: &Match) -> Result<Self> {
        let Match { commands, namespaces, users, applications, networks, access, in_transaction } = matches;
        for command in commands {
            check_command(command)?;
        }
        let text = |patterns: &[String]| patterns.iter().map(|text| TextPattern::new(text)).collect();
        if let Some(user) = users.iter().find(|user| !user.contains('.') && *user != "*") {
            return Err(Error::invalid("a user is written database.user, as admin.ada").with_context("got", user.escape_debug()));
        }
        Ok(Self {
            commands: commands.iter().map(|name| kind::canonical(name).to_owned()).collect(),
            namespaces: namespaces.iter().map(|pattern| pattern.parse()).collect::<Result<_>>()?,
            users: text(users),
            applications: text(applications),
            networks: networks.iter().map(|network| parse_network(network)).collect::<Result<_>>()?,
            access: *access,
            in_transaction: *in_transaction,
        })
    }

    fn matches(&self, facts: &Facts<'_>) -> Matched {
        let Facts { command, access, touched, who } = facts;
        let one_of =
            |patterns: &[TextPattern], text: &str| patterns.is_empty() || patterns.iter().any(|pattern| pattern.matches(text));
        let is_in = |is: bool| is == (command.transaction != Transaction::Outside);
        let matches = (self.commands.is_empty() || self.matches_command(command))
            && (self.access.is_none() || self.access == *access)
            && self.in_transaction.is_none_or(is_in)
            && (self.networks.is_empty() || self.networks.iter().any(|network| network.contains(&who.address)))
            && one_of(&self.applications, who.application.as_deref().unwrap_or_default());
        if !matches {
            return Matched::No;
        }
        self.matches_users(&who.users).min(self.matches_namespaces(touched))
    }

    fn matches_command(&self, command: &Command<'_>) -> bool {
        let is_named = |name: &str| self.commands.iter().any(|known| known == kind::canonical(name));
        is_named(command.name) || command.explained().is_some_and(is_named)
    }

    fn matches_users(&self, users: &[String]) -> Matched {
        if self.users.is_empty() {
            return Matched::Whole;
        }
        let matching = users.iter().filter(|user| self.users.iter().any(|pattern| pattern.matches(user))).count();
        of(matching, users.len())
    }

    fn matches_namespaces(&self, touched: &Touched) -> Matched {
        if self.namespaces.is_empty() {
            return Matched::Whole;
        }
        let any = |matches: &dyn Fn(&NamespacePattern) -> bool| self.namespaces.iter().any(matches);
        let (mut matching, mut in_part) = (0, false);
        for name in &touched.namespaces {
            matching += usize::from(any(&|pattern| pattern.matches(name)));
        }
        for database in &touched.databases {
            matching += usize::from(any(&|pattern| pattern.matches_all_of(database)));
            in_part |= any(&|pattern| pattern.may_match_in(database));
        }
        let is_all = || any(&|pattern| pattern.to_string() == "*");
        if touched.everything {
            return if is_all() { Matched::Whole } else { Matched::Part };
        }
        // What is about the server alone is about no namespace but all.
        if touched.namespaces.is_empty() && touched.databases.is_empty() {
            return if is_all() { Matched::Whole } else { Matched::No };
        }
        match of(matching, touched.namespaces.len() + touched.databases.len()) {
            Matched::No if in_part => Matched::Part,
            matched => matched,
        }
    }
}

fn of(matching: usize, all: usize) -> Matched {
    match matching {
        0 => Matched::No,
        some if some < all => Matched::Part,
        _ => Matched::Whole,
    }
}

/// A name that nothing would ever match is a mistake, and one that a rule cannot be about is another.
fn check_command(name: &str) -> Result<()> {
    let wrong = |what: &'static str| Err(Error::invalid(what).with_context("command", name.escape_debug()));
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return wrong("a command is called by its name, as findAndModify");
    }
    if matches!(Kind::of(name), Kind::Connection | Kind::GetMore) {
        return wrong("no rule is asked about this command: it begins, continues or ends something, and is always let through");
    }
    match kind::spelling(name) {
        Some(spelling) if spelling != name => {
            wrong("commands are written as the server writes them").map_err(|error| error.with_context("as", spelling))
        }
        // What later servers know may have a rule, too.
        _ => Ok(()),
    }
}

/// A network, or one address.
fn parse_network(text: &str) -> Result<IpNet> {
    let network = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    network.map_err(|_| {
        Error::invalid("a network is written as 10.0.0.0/8, an address as 192.0.2.7").with_context("got", text.escape_debug())
    })
}

const LONGEST_NAME: usize = 100;
const LONGEST_COMMENT: usize = 1000;
const LONGEST_WAIT: Duration = Duration::from_secs(60 * 60);

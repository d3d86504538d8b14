//! What state each alert is in. Nothing here asks a server or looks at a clock: it is told what was read, and when.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use mongo_core::{Error, Result, bson::DateTime};
use serde::{Deserialize, Serialize};

use super::{
    rule::{Expression, Quantity, Rule, Severity},
    sink::AlertSink,
};
use crate::{
    history::Summary,
    monitor::{Monitor, Shared, View},
};

/// Rules, the state of their alerts, and who is told.
///
/// ```no_run
/// # async fn f(monitor: mongo_monitor::Monitor) -> mongo_core::Result<()> {
/// use std::{sync::Arc, time::Duration};
/// use mongo_monitor::{Alerts, LogSink, MonitorSettings, default_rules};
///
/// let mut alerts = Alerts::new(default_rules(&MonitorSettings::default()))?.with_sink(Arc::new(LogSink));
/// loop {
///     alerts.evaluate(&monitor);
///     tokio::time::sleep(Duration::from_secs(10)).await;
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct Alerts {
    rules: Vec<Rule>,
    sinks: Vec<Arc<dyn AlertSink>>,
    repeat: Duration,
    group_wait: Duration,
    silences: Vec<Silence>,
    tracked: BTreeMap<Key, Tracked>,
    /// When it was looked last.
    last: Option<Moment>,
    /// What is still to be taken up, when it is known how late it is.
    restored: Option<AlertState>,
}

/// What an alert is of: a rule, a member, and the labels of a series.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Key {
    rule: String,
    /// None for what is of all members together.
    member: Option<String>,
    labels: BTreeMap<String, String>,
}

/// The state of an alert that is pending or fires. Times are milliseconds of a clock that never goes back; they can lie before its beginning.
#[derive(Clone, Debug)]
struct Tracked {
    value: Option<f64>,
    /// Since when it holds.
    since: i64,
    fires: bool,
    /// Since when it has been well, while it still fires.
    well_since: Option<i64>,
    told: Option<i64>,
    /// Since when it is to be told, while others are waited for that may belong to it.
    waits_since: Option<i64>,
    /// Whether there was anything to look at, the last time.
    has_data: bool,
}

/// A time, by both clocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    pub(super) at: i64,
    pub(super) wall: DateTime,
}

/// An alert, as it is told.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Alert {
    /// Names it through all its life, and the next time too: rule, member and labels.
    pub id: String,
    /// The rule.
    pub rule: String,
    /// How bad it is.
    pub severity: Severity,
    /// The member that it is of; none for what is of all together.
    pub member: Option<String>,
    /// The labels of the series that it is of.
    pub labels: BTreeMap<String, String>,
    /// What was read last.
    pub value: Option<f64>,
    /// The state that it is in.
    pub phase: AlertPhase,
    /// Since when the condition has held.
    pub since: DateTime,
    /// When it was resolved.
    pub ended: Option<DateTime>,
    /// What to do about it, for a person.
    pub summary: String,
    /// Whether anything could be read. Without, an alert stays what it was.
    pub has_data: bool,
    /// Why it is not told: by which rule that fires it is explained, or who has silenced it.
    pub muted: Option<String>,
}

/// The state of an alert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AlertPhase {
    /// Its condition holds, and has not for long enough.
    Pending,
    /// Its condition has held for long enough.
    Firing,
    /// It fired, and is over.
    Resolved,
}

/// Keeps alerts from being told for a while. They are tracked all the same, and told when it ends if they still fire.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Silence {
    /// Only alerts of this rule.
    pub rule: Option<String>,
    /// Only alerts of this member.
    pub member: Option<String>,
    /// Until when, by the wall clock.
    pub until: DateTime,
    /// Who wanted it, and why.
    pub reason: String,
}

impl Silence {
    /// Silences everything until a time; `rule` and `member` can be set to narrow it.
    pub fn until(until: DateTime, reason: impl Into<String>) -> Self {
        Self { rule: None, member: None, until, reason: reason.into() }
    }
}

/// What is pending or fires, to outlive a restart. Plain data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct AlertState {
    saved: Option<DateTime>,
    alerts: Vec<Saved>,
    silences: Vec<Silence>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Saved {
    #[serde(flatten)]
    key: Key,
    value: Option<f64>,
    fires: bool,
    /// Milliseconds before it was saved.
    held_for: i64,
    well_for: Option<i64>,
    told_before: Option<i64>,
    #[serde(default)]
    waited_for: Option<i64>,
}

/// Where numbers come from.
pub(super) trait Readings {
    fn members(&self) -> Vec<String>;

    /// The series of a member that are meant, each with the values of its labels.
    fn values(&self, member: &str, quantity: &Quantity) -> Vec<(Vec<String>, f64)>;

    /// Whether all that there is of a metric of a member was read just now, so that what is missing is not there.
    fn is_whole(&self, member: &str, quantity: &Quantity) -> bool;

    /// Whether the members are all that there are, so that who is missing is gone.
    fn has_all_members(&self) -> bool;
}

/// What is to be told, and whom.
#[derive(Debug)]
pub(crate) struct News {
    pub(crate) alerts: Vec<Alert>,
    sinks: Vec<Arc<dyn AlertSink>>,
}

impl News {
    pub(crate) fn tell(&self) {
        if !self.alerts.is_empty() {
            self.sinks.iter().for_each(|sink| sink.tell(&self.alerts));
        }
    }
}

/// What a monitor shows at one time.
struct Shown<'a> {
    monitor: &'a Shared,
    view: View,
}

impl Readings for Shown<'_> {
    fn members(&self) -> Vec<String> {
        self.view.members.iter().map(|member| member.host.clone()).collect()
    }

    fn values(&self, member: &str, quantity: &Quantity) -> Vec<(Vec<String>, f64)> {
        let Some(metric) = quantity.metric() else { return Vec::new() };
        if let Some(last) = quantity.rate() {
            let summaries = self.monitor.current(member, metric, last, |labels| quantity.covers(metric, labels));
            // What is known of a small part of the while only says nothing of it.
            let known = |summary: &Summary| summary.known_seconds >= last.as_secs_f64() / 2.0;
            let rates = summaries.into_iter().filter(|(_, summary)| known(summary));
            return rates.filter_map(|(labels, summary)| Some((labels, summary.rate?))).collect();
        }
        let members = self.view.members.iter().filter(|known| known.host == member);
        let wanted =
            members.flat_map(|member| member.readings_of(metric)).filter(|reading| quantity.covers(metric, &reading.labels));
        wanted.map(|reading| (reading.labels.clone(), reading.as_number())).collect()
    }

    fn is_whole(&self, member: &str, quantity: &Quantity) -> bool {
        // A series that is read and has no rate yet, as after a restart of either side, has not ended.
        let has_series = quantity.metric().zip(quantity.rate()).is_some_and(|(metric, last)| {
            !self.monitor.current(member, metric, last, |labels| quantity.covers(metric, labels)).is_empty()
        });
        !has_series && self.monitor.is_read_whole(member, &quantity.metric)
    }

    fn has_all_members(&self) -> bool {
        self.monitor.knows_members()
    }
}

impl Alerts {
    /// Alerts by these rules, told to nobody yet.
    ///
    /// # Errors
    /// `InvalidInput` for a rule that makes no sense ([`Rule::check`]), for two of one name, and for one that is inhibited by one that does not exist.
    pub fn new(rules: Vec<Rule>) -> Result<Self> {
        let mut names = BTreeSet::new();
        for rule in &rules {
            rule.check()?;
            if !names.insert(&rule.name) {
                return Err(Error::invalid("two rules have one name").with_context("rule", &rule.name));
            }
        }
        for rule in &rules {
            if let Some(other) = rule.inhibited_by.iter().find(|other| !names.contains(other)) {
                let error = Error::invalid("a rule is inhibited by one that does not exist");
                return Err(error.with_context("rule", &rule.name).with_context("inhibited_by", other));
            }
        }
        Ok(Self {
            rules,
            sinks: Vec::new(),
            repeat: REPEAT,
            group_wait: Duration::ZERO,
            silences: Vec::new(),
            tracked: BTreeMap::new(),
            last: None,
            restored: None,
        })
    }

    /// Also tells this one.
    #[must_use]
    pub fn with_sink(mut self, sink: Arc<dyn AlertSink>) -> Self {
        self.sinks.push(sink);
        self
    }

    /// After how long what still fires is told again. Default four hours.
    #[must_use]
    pub fn with_repeat(mut self, repeat: Duration) -> Self {
        self.repeat = repeat;
        self
    }

    /// For how long an alert that has begun to fire waits for others, so that one outage is told at once and not member by member. Whatever fires when the
    /// first has waited for so long is told together; what is over by then is told to nobody. What is over of that which was told, and what is told again, waits
    /// for nothing.
    ///
    /// Default none: what a round finds is told at its end, together.
    ///
    /// ```
    /// use std::time::Duration;
    /// use mongo_monitor::{Alerts, MonitorSettings, default_rules};
    ///
    /// let alerts = Alerts::new(default_rules(&MonitorSettings::default()))?.with_group_wait(Duration::from_secs(30));
    /// # Ok::<_, mongo_core::Error>(())
    /// ```
    #[must_use]
    pub fn with_group_wait(mut self, wait: Duration) -> Self {
        self.group_wait = wait;
        self
    }

    /// Keeps some alerts from being told for a while.
    pub fn silence(&mut self, silence: Silence) {
        self.silences.push(silence);
    }

    /// The rules.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// Looks at what a monitor has read last, and tells the sinks what is new. Gives the same.
    pub fn evaluate(&mut self, monitor: &Monitor) -> Vec<Alert> {
        let news = self.evaluate_in(monitor.shared());
        news.tell();
        news.alerts
    }

    /// The same, but for the telling: that is for the caller to do, once he holds no lock.
    pub(crate) fn evaluate_in(&mut self, monitor: &Shared) -> News {
        let (at, wall) = monitor.now();
        let now = Moment { at: i64::try_from(at.as_millis()).unwrap_or(i64::MAX), wall };
        let alerts = self.look(now, &Shown { monitor, view: monitor.view() });
        News { alerts, sinks: self.sinks.clone() }
    }

    /// What is pending and what fires, by name.
    pub fn active(&self) -> Vec<Alert> {
        let Some(now) = self.last else { return Vec::new() };
        let phase = |tracked: &Tracked| if tracked.fires { AlertPhase::Firing } else { AlertPhase::Pending };
        self.tracked.iter().filter_map(|(key, tracked)| self.alert(key, tracked, phase(tracked), now)).collect()
    }

    /// What is to outlive a restart.
    pub fn save(&self) -> AlertState {
        let Some(now) = self.last else { return self.restored.clone().unwrap_or_default() };
        let saved = |(key, tracked): (&Key, &Tracked)| Saved {
            key: key.clone(),
            value: tracked.value,
            fires: tracked.fires,
            held_for: now.at - tracked.since,
            well_for: tracked.well_since.map(|since| now.at - since),
            told_before: tracked.told.map(|told| now.at - told),
            waited_for: tracked.waits_since.map(|since| now.at - since),
        };
        let alerts = self.tracked.iter().map(saved).collect();
        AlertState { saved: Some(now.wall), alerts, silences: self.silences.clone() }
    }

    /// Takes up what an earlier run has saved: what was pending has been for as long, and what was told is not told anew.
    pub fn restore(&mut self, state: AlertState) {
        self.restored = Some(state);
    }

    fn take_up(&mut self, state: AlertState, now: Moment) {
        // A wall clock that was set back must not make anything younger than it was.
        let away = state.saved.map_or(0, |saved| (now.wall.timestamp_millis() - saved.timestamp_millis()).max(0));
        for saved in state.alerts {
            if !self.rules.iter().any(|rule| rule.name == saved.key.rule) {
                continue;
            }
            let before = |milliseconds: i64| now.at - away - milliseconds;
            let tracked = Tracked {
                value: saved.value,
                // It is not known whether it held meanwhile: only what has fired goes on.
                since: if saved.fires { before(saved.held_for) } else { now.at - saved.held_for },
                fires: saved.fires,
                well_since: saved.well_for.map(before),
                told: saved.told_before.map(before),
                waits_since: saved.waited_for.map(before),
                has_data: false,
            };
            self.tracked.entry(saved.key).or_insert(tracked);
        }
        self.silences.extend(state.silences);
    }

    /// One round.
    pub(super) fn look(&mut self, now: Moment, readings: &dyn Readings) -> Vec<Alert> {
        if let Some(state) = self.restored.take() {
            self.take_up(state, now);
        }
        let passed = self.last.map_or(0, |last| now.at - last.at).max(0);
        self.last = Some(now);
        self.silences.retain(|silence| silence.until > now.wall);
        let members = readings.members();
        let mut resolved = Vec::new();
        let rules = std::mem::take(&mut self.rules);
        for rule in &rules {
            let numbers = numbers(rule, &members, readings);
            for (key, number) in &numbers {
                resolved.extend(self.step(rule, key, *number, now));
            }
            resolved.extend(self.without_data(rule, &numbers, readings, passed));
        }
        self.rules = rules;
        self.news(resolved, now)
    }

    /// Takes a number in. Gives the alert if it is over.
    fn step(&mut self, rule: &Rule, key: &Key, number: f64, now: Moment) -> Option<(Key, Tracked)> {
        let Some(tracked) = self.tracked.get_mut(key) else {
            if rule.threshold.holds(number) {
                let fires = rule.for_seconds == 0;
                let new = Tracked {
                    value: Some(number),
                    since: now.at,
                    fires,
                    well_since: None,
                    told: None,
                    waits_since: None,
                    has_data: true,
                };
                self.tracked.insert(key.clone(), new);
            }
            return None;
        };
        tracked.value = Some(number);
        tracked.has_data = true;
        let alarming = match rule.clear.filter(|_| tracked.fires) {
            Some(clear) => rule.threshold.moved_to(clear),
            None => rule.threshold,
        };
        if alarming.holds(number) {
            tracked.well_since = None;
            tracked.fires |= now.at - tracked.since >= milliseconds(rule.for_seconds);
            return None;
        }
        let is_over = !tracked.fires || {
            let well_since = *tracked.well_since.get_or_insert(now.at);
            now.at - well_since >= milliseconds(rule.keep_firing_seconds)
        };
        if is_over { self.tracked.remove_entry(key) } else { None }
    }

    /// Alerts of a rule for which there is no number: they stay what they are, and the while does not count. Those of members and series that are no longer there
    /// are over.
    fn without_data(
        &mut self,
        rule: &Rule,
        numbers: &BTreeMap<Key, f64>,
        readings: &dyn Readings,
        passed: i64,
    ) -> Vec<(Key, Tracked)> {
        let members = readings.members();
        let mut gone = Vec::new();
        for (key, tracked) in self.tracked.iter_mut().filter(|(key, _)| key.rule == rule.name && !numbers.contains_key(key)) {
            tracked.has_data = false;
            let is_gone = key.member.as_ref().is_some_and(|member| match members.contains(member) {
                // Its series has ended: a member no longer tells the lag of others, or a collection was dropped.
                true => rule.expression.quantities().all(|quantity| readings.is_whole(member, quantity)),
                // Before all are known nobody is gone.
                false => readings.has_all_members(),
            });
            if is_gone {
                gone.push(key.clone());
            } else if !tracked.fires {
                tracked.since += passed;
            } else if let Some(well_since) = &mut tracked.well_since {
                *well_since += passed;
            }
        }
        gone.into_iter().filter_map(|key| self.tracked.remove_entry(&key)).collect()
    }

    /// What is to be told: what has begun to fire, what has long gone on, and what is over of that which was told.
    fn news(&mut self, resolved: Vec<(Key, Tracked)>, now: Moment) -> Vec<Alert> {
        let told = resolved.iter().filter(|(_, tracked)| tracked.told.is_some());
        let mut news: Vec<Alert> =
            told.filter_map(|(key, tracked)| self.alert(key, tracked, AlertPhase::Resolved, now)).collect();
        let millis = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        let (repeat, group_wait) = (millis(self.repeat), millis(self.group_wait));
        // What is well already when it comes to be told, waits: it may be over before.
        let due = |tracked: &Tracked| match tracked.told {
            None => tracked.fires && tracked.well_since.is_none(),
            Some(told) => tracked.fires && now.at - told >= repeat,
        };
        let due: Vec<Alert> = self
            .tracked
            .iter()
            .filter(|(_, tracked)| due(tracked))
            .filter_map(|(key, tracked)| self.alert(key, tracked, AlertPhase::Firing, now))
            .filter(|alert| alert.muted.is_none())
            .collect();
        let ids: BTreeSet<&String> = due.iter().map(|alert| &alert.id).collect();
        let mut group_is_due = false;
        for (key, tracked) in self.tracked.iter_mut().filter(|(_, tracked)| tracked.fires && tracked.told.is_none()) {
            // Also while it is muted: once it is not, nobody waits for it any longer.
            let since = *tracked.waits_since.get_or_insert(now.at);
            group_is_due |= now.at - since >= group_wait && ids.contains(&key.id());
        }
        let mut told = BTreeSet::new();
        for (key, tracked) in &mut self.tracked {
            let id = key.id();
            if ids.contains(&id) && (group_is_due || tracked.told.is_some()) {
                tracked.told = Some(now.at);
                tracked.waits_since = None;
                told.insert(id);
            }
        }
        news.extend(due.into_iter().filter(|alert| told.contains(&alert.id)));
        news
    }

    fn alert(&self, key: &Key, tracked: &Tracked, phase: AlertPhase, now: Moment) -> Option<Alert> {
        let rule = self.rules.iter().find(|rule| rule.name == key.rule)?;
        Some(Alert {
            id: key.id(),
            rule: key.rule.clone(),
            severity: rule.severity,
            member: key.member.clone(),
            labels: key.labels.clone(),
            value: tracked.value,
            phase,
            since: DateTime::from_millis(now.wall.timestamp_millis().saturating_sub(now.at - tracked.since)),
            ended: (phase == AlertPhase::Resolved).then_some(now.wall),
            summary: rule.summary.clone(),
            has_data: tracked.has_data,
            muted: self.muted(rule, key),
        })
    }

    fn muted(&self, rule: &Rule, key: &Key) -> Option<String> {
        let is_meant = |wanted: &Option<String>, is: Option<&String>| wanted.as_ref().is_none_or(|wanted| Some(wanted) == is);
        let silence = self
            .silences
            .iter()
            .find(|silence| is_meant(&silence.rule, Some(&key.rule)) && is_meant(&silence.member, key.member.as_ref()));
        if let Some(silence) = silence {
            return Some(format!("silenced: {}", silence.reason));
        }
        // What is wrong with all explains what is wrong with one; and what is said of a member by another is of that member.
        let about = |key: &Key| key.labels.get("member").or(key.member.as_ref()).cloned();
        let explains = |(other, tracked): &(&Key, &Tracked)| {
            tracked.fires
                && rule.inhibited_by.contains(&other.rule)
                && (other.member.is_none() || about(other) == about(key) || other.member == key.member)
        };
        self.tracked.iter().find(explains).map(|(other, _)| format!("explained by {}", other.id()))
    }
}

impl Key {
    fn id(&self) -> String {
        let member = self.member.as_ref().map(|member| format!(" of {member}")).unwrap_or_default();
        let labels: Vec<String> = self.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let labels = if labels.is_empty() { String::new() } else { format!(" ({})", labels.join(", ")) };
        format!("{}{member}{labels}", self.rule)
    }
}

/// What a rule looks at, by what it would be an alert of.
fn numbers(rule: &Rule, members: &[String], readings: &dyn Readings) -> BTreeMap<Key, f64> {
    let key = |member: Option<&String>, labels: BTreeMap<String, String>| Key {
        rule: rule.name.clone(),
        member: member.cloned(),
        labels,
    };
    let sum = |member: &String, quantities: &[Quantity]| {
        let values: Vec<f64> = quantities.iter().flat_map(|of| readings.values(member, of)).map(|(_, value)| value).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>())
    };
    let all = |quantity: &Quantity| -> Vec<f64> {
        members.iter().flat_map(|member| readings.values(member, quantity)).map(|(_, value)| value).collect()
    };
    let mut numbers = BTreeMap::new();
    match &rule.expression {
        Expression::Each(quantity) => {
            let names = quantity.metric().map(|metric| metric.labels).unwrap_or_default();
            for member in members {
                for (values, number) in readings.values(member, quantity) {
                    let labels = names.iter().map(|name| (*name).to_owned()).zip(values);
                    // What the rule has chosen itself tells nobody anything.
                    let labels = labels.filter(|(name, _)| !quantity.labels.contains_key(name)).collect();
                    numbers.insert(key(Some(member), labels), number);
                }
            }
        }
        Expression::Sum(of) => {
            numbers.extend(members.iter().filter_map(|member| Some((key(Some(member), BTreeMap::new()), sum(member, of)?))));
        }
        Expression::Ratio { of, to } => {
            for member in members {
                let is_rate = to.iter().all(|quantity| quantity.rate_over_seconds.is_some());
                let ratio = match (sum(member, of), sum(member, to)) {
                    // Where nothing happens nothing is wrong.
                    (Some(0.0), Some(0.0)) => Some(0.0),
                    // Of what does not happen at all it may have been less than once in the while.
                    (Some(of), Some(0.0)) if is_rate => Some(of / LEAST_RATE),
                    (_, Some(0.0)) => None,
                    (of, to) => of.zip(to).map(|(of, to)| of / to),
                };
                numbers.extend(ratio.map(|ratio| (key(Some(member), BTreeMap::new()), ratio)));
            }
        }
        Expression::Difference { of, less } => {
            for member in members {
                if let (Some(of), Some(less)) = (sum(member, std::slice::from_ref(of)), sum(member, std::slice::from_ref(less))) {
                    numbers.insert(key(Some(member), BTreeMap::new()), of - less);
                }
            }
        }
        Expression::Total(quantity) => {
            let values = all(quantity);
            if !values.is_empty() {
                numbers.insert(key(None, BTreeMap::new()), values.iter().sum());
            }
        }
        Expression::Mean(quantity) => {
            let values = all(quantity);
            if !values.is_empty() {
                #[expect(clippy::cast_precision_loss, reason = "there are not that many members")]
                numbers.insert(key(None, BTreeMap::new()), values.iter().sum::<f64>() / values.len() as f64);
            }
        }
    }
    numbers
}

fn milliseconds(seconds: u64) -> i64 {
    i64::try_from(seconds).unwrap_or(i64::MAX).saturating_mul(1000)
}

/// Once in five minutes.
const LEAST_RATE: f64 = 1.0 / 300.0;
const REPEAT: Duration = Duration::from_secs(4 * 3600);

#[cfg(test)]
mod tests;

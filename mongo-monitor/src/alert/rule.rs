//! What a rule is.

use std::{collections::BTreeMap, fmt, time::Duration};

use mongo_core::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::{
    metric::{Kind, Metric},
    table::metric,
};

/// When to be alarmed. Plain data: a host can keep its own in a file.
///
/// ```
/// use mongo_monitor::{Rule, Severity};
///
/// let rule: Rule = serde_json::from_str(
///     r#"{ "name": "many_cursors", "severity": "warning", "summary": "look who opens them",
///          "expression": { "each": { "metric": "mongodb_cursors_open", "labels": { "kind": "total" } } },
///          "threshold": { "above": 500.0 }, "for_seconds": 120 }"#,
/// ).unwrap();
/// assert_eq!(rule.severity, Severity::Warning);
/// rule.check().unwrap();
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Rule {
    /// Its name, by which it is silenced and by which it inhibits others.
    pub name: String,
    /// How bad it is.
    pub severity: Severity,
    /// What to do about it, for a person.
    pub summary: String,
    /// The number that is looked at.
    pub expression: Expression,
    /// On which side of what the number is alarming.
    pub threshold: Threshold,
    /// Where the number is well again once the alert fires, so that one that hovers does not come and go. Default the threshold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clear: Option<f64>,
    /// How long it must be so before the alert fires, in seconds. Default 0: at once.
    #[serde(default)]
    pub for_seconds: u64,
    /// How long it must be well before the alert is resolved, in seconds. Default 0: at once.
    #[serde(default)]
    pub keep_firing_seconds: u64,
    /// Rules that say why this one fires: while one of them fires for the same member, this one is not told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inhibited_by: Vec<String>,
}

/// How bad an alert is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Severity {
    /// To be looked at soon.
    Warning,
    /// To be looked at now.
    Critical,
}

impl Severity {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// On which side of what a number is alarming.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Threshold {
    /// Above it.
    Above(f64),
    /// Below it.
    Below(f64),
}

/// The number that a rule looks at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Expression {
    /// Every series of every member by itself.
    Each(Quantity),
    /// Of every member, the sum of all its series.
    Sum(Vec<Quantity>),
    /// Of every member, one sum divided by another. Nothing where that is zero.
    Ratio {
        /// What is divided.
        of: Vec<Quantity>,
        /// By what.
        to: Vec<Quantity>,
    },
    /// Of every member, one number less another.
    Difference {
        /// From which is taken.
        of: Quantity,
        /// What is taken off.
        less: Quantity,
    },
    /// The sum over all members.
    Total(Quantity),
    /// The mean over all members.
    Mean(Quantity),
}

/// Readings of a metric, or their rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Quantity {
    /// Name of the metric.
    pub metric: String,
    /// Only series with these labels; those that are not named may have any value.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Instead of the newest reading, of a counter by how much it grew in a second over so many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_over_seconds: Option<u64>,
}

impl Quantity {
    /// The newest readings of a metric.
    pub fn of(metric: impl Into<String>) -> Self {
        Self { metric: metric.into(), labels: BTreeMap::new(), rate_over_seconds: None }
    }

    /// Only the series with a label.
    #[must_use]
    pub fn with(mut self, label: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.insert(label.into(), value.into());
        self
    }

    /// Their rate.
    #[must_use]
    pub fn rate_over(mut self, seconds: u64) -> Self {
        self.rate_over_seconds = Some(seconds);
        self
    }

    pub(super) fn metric(&self) -> Option<&'static Metric> {
        metric(&self.metric)
    }

    /// The while over which a rate is taken.
    pub(super) fn rate(&self) -> Option<Duration> {
        self.rate_over_seconds.map(Duration::from_secs)
    }

    /// Whether a series of its metric is meant.
    pub(super) fn covers(&self, metric: &Metric, labels: &[String]) -> bool {
        let mut named = metric.labels.iter().zip(labels);
        named.all(|(name, value)| self.labels.get(*name).is_none_or(|wanted| wanted == value))
    }

    fn check(&self) -> Result<()> {
        let metric = self
            .metric()
            .ok_or_else(|| Error::invalid("a rule names a metric that does not exist").with_context("metric", &self.metric))?;
        if metric.name.starts_with("db_client_") || metric.name.starts_with("mongodb_client_") {
            return Err(
                Error::invalid("rules are of members, and not of what a client does").with_context("metric", &self.metric)
            );
        }
        if let Some(label) = self.labels.keys().find(|label| !metric.labels.contains(&label.as_str())) {
            let error = Error::invalid("a rule names a label that its metric does not have");
            return Err(error.with_context("metric", &self.metric).with_context("label", label));
        }
        let grows = matches!(metric.kind, Kind::Counter | Kind::Histogram);
        if grows != self.rate_over_seconds.is_some() {
            let what = if grows { "what matters of a counter is its rate" } else { "only counters have a rate" };
            return Err(Error::invalid(what).with_context("metric", &self.metric));
        }
        if self.rate_over_seconds == Some(0) {
            return Err(Error::invalid("a rate is taken over some time").with_context("metric", &self.metric));
        }
        Ok(())
    }
}

impl Expression {
    /// Everything that it is made of.
    pub(super) fn quantities(&self) -> impl Iterator<Item = &Quantity> {
        let (some, more): (&[Quantity], &[Quantity]) = match self {
            Self::Each(one) | Self::Total(one) | Self::Mean(one) => (std::slice::from_ref(one), &[]),
            Self::Sum(of) => (of, &[]),
            Self::Ratio { of, to } => (of, to),
            Self::Difference { of, less } => (std::slice::from_ref(of), std::slice::from_ref(less)),
        };
        some.iter().chain(more)
    }
}

impl Threshold {
    /// Whether a number is alarming.
    pub(super) fn holds(self, number: f64) -> bool {
        match self {
            Self::Above(limit) => number > limit,
            Self::Below(limit) => number < limit,
        }
    }

    /// The same side of another limit.
    pub(super) fn moved_to(self, limit: f64) -> Self {
        match self {
            Self::Above(_) => Self::Above(limit),
            Self::Below(_) => Self::Below(limit),
        }
    }

    fn limit(self) -> f64 {
        match self {
            Self::Above(limit) | Self::Below(limit) => limit,
        }
    }
}

impl fmt::Display for Threshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Above(limit) => write!(f, "above {limit}"),
            Self::Below(limit) => write!(f, "below {limit}"),
        }
    }
}

impl Rule {
    /// A rule that fires at once and is resolved at once; its other fields can be set.
    pub fn new(
        name: impl Into<String>,
        severity: Severity,
        expression: Expression,
        threshold: Threshold,
        summary: impl Into<String>,
    ) -> Self {
        Self {
            name: name.into(),
            severity,
            summary: summary.into(),
            expression,
            threshold,
            clear: None,
            for_seconds: 0,
            keep_firing_seconds: 0,
            inhibited_by: Vec::new(),
        }
    }

    /// Whether the rule makes sense.
    ///
    /// # Errors
    /// `InvalidInput`, naming the rule and what is wrong: a metric or a label that does not exist, a rate of what is no counter, a counter without
    /// one, a limit that is no number, or a clear threshold on the alarming side.
    pub fn check(&self) -> Result<()> {
        let named = |error: Error| error.with_context("rule", &self.name);
        if self.name.is_empty() {
            return Err(Error::invalid("a rule has no name"));
        }
        self.expression.quantities().try_for_each(Quantity::check).map_err(named)?;
        if self.expression.quantities().next().is_none() {
            return Err(named(Error::invalid("a rule looks at nothing")));
        }
        let limits = [Some(self.threshold.limit()), self.clear];
        if limits.into_iter().flatten().any(|limit| !limit.is_finite()) {
            return Err(named(Error::invalid("a threshold is no number")));
        }
        // Else it would be alarming and well at the same time.
        if self.clear.is_some_and(|clear| self.threshold.holds(clear)) {
            return Err(named(Error::invalid("where a rule's number is well again must not be where it is alarming")));
        }
        Ok(())
    }
}

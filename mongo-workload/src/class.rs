//! Classes of work, as data.

use std::{num::NonZeroU32, time::Duration};

use mongo_core::{Error, Result, rate::Rate};

/// One class of work: what share it gets, how much of it may be under way, and within which limits each of its operations runs.
///
/// Made by [`Class::new`] and changed field by field; [`Classes::new`] checks them all.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct Class {
    /// Its name, also the label in metrics. At most 64 letters, digits, `_`, `-` and `.`.
    pub name: String,
    /// Its share of the time that operations take on the server, against the weights of the other classes that have work waiting. Default 1.
    pub weight: NonZeroU32,
    /// Operations of it that may be under way at once. Default 64.
    pub max_concurrent: u32,
    /// Of these, so many while a class before it has work, or had some within the last [`RESERVED_FOR`]; reads and writes alike. Default: all.
    pub max_beside_urgent: u32,
    /// Of the slots for reads, and of those for writes, so many are kept for this class while it has had such work within the last
    /// [`RESERVED_FOR`]; otherwise they are lent to the others. [`AdaptiveSlots`](crate::AdaptiveSlots) are never fewer than what is reserved and one. Default 0.
    pub reserved: u32,
    /// Bytes that operations of it under way may need together, as their submitters say. One that needs more than all of it is refused. Default 256 MiB.
    pub max_memory_bytes: u64,
    /// Operations of it that may wait, reads and writes counted apart; more are refused at once. Default 1000.
    pub max_queued: u32,
    /// What is given to the server as `maxTimeMS`, and the longest that an operation may take with its wait. Default 15 s. In a file: seconds.
    #[cfg_attr(feature = "serde", serde(with = "mongo_core::seconds"))]
    pub time_limit: Duration,
    /// Documents in a batch. Default 100.
    pub batch_size: u32,
    /// Who has waited longer than this goes before its turn, by age alone: see the starvation bound in the crate's docs. Of no use unless it is
    /// well below the time within which operations must be done. Default 5 s. In a file: seconds.
    #[cfg_attr(feature = "serde", serde(with = "mongo_core::seconds"))]
    pub ages_after: Duration,
    /// How often work may be submitted. Default: as often as one likes.
    pub rate: Option<Rate>,
    /// The rules of this class that change nothing: what they would have done is counted in `mongo_workload_observed_total`. Default: none.
    pub observe_only: Vec<Rule>,
}

/// A rule of a class, to be named where it is to be tried out first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Rule {
    /// [`max_concurrent`](Class::max_concurrent) or [`max_beside_urgent`](Class::max_beside_urgent) holds work up.
    Concurrency,
    /// What would not have its turn in time is refused.
    Deadline,
    /// [`max_memory_bytes`](Class::max_memory_bytes) holds work up, or refuses it.
    Memory,
    /// [`max_queued`](Class::max_queued) refuses work.
    Queue,
    /// [`rate`](Class::rate) refuses work.
    Rate,
    /// [`time_limit`](Class::time_limit) ends work. While it only observes, work without a time of its own may take a day.
    TimeLimit,
}

impl Rule {
    pub(crate) const ALL: [Self; 6] = [Self::Concurrency, Self::Deadline, Self::Memory, Self::Queue, Self::Rate, Self::TimeLimit];

    /// As it is called in metrics and in files.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Concurrency => "concurrency",
            Self::Deadline => "deadline",
            Self::Memory => "memory",
            Self::Queue => "queue",
            Self::Rate => "rate",
            Self::TimeLimit => "time_limit",
        }
    }
}

impl Default for Class {
    fn default() -> Self {
        Self {
            name: String::new(),
            weight: NonZeroU32::MIN,
            max_concurrent: 64,
            max_beside_urgent: u32::MAX,
            reserved: 0,
            max_memory_bytes: 256 << 20,
            max_queued: 1000,
            time_limit: Duration::from_secs(15),
            batch_size: 100,
            ages_after: Duration::from_secs(5),
            rate: None,
            observe_only: Vec::new(),
        }
    }
}

impl Class {
    /// A class with this name and the defaults of every field.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Whether a rule of it is in force, and not only observed.
    pub(crate) fn enforces(&self, rule: Rule) -> bool {
        !self.observe_only.contains(&rule)
    }

    fn check(&self) -> Result<()> {
        let wrong = |what: &'static str| Err(Error::invalid(what).with_context("class", self.name.escape_debug()));
        if !is_name(&self.name) {
            return wrong("a class needs a name of 1 to 64 letters, digits, '_', '-' and '.'");
        }
        if self.max_concurrent == 0 {
            return wrong("a class that may have nothing under way never does anything: set max_concurrent to 1 or more");
        }
        if self.max_beside_urgent == 0 {
            return wrong(
                "a class that may have nothing under way beside more urgent ones may never do anything: set max_beside_urgent to 1 or more",
            );
        }
        if self.reserved > self.max_concurrent.min(self.max_beside_urgent) {
            return wrong(
                "more is reserved for a class than may be under way of it: lower reserved, or raise max_concurrent and max_beside_urgent",
            );
        }
        if self.time_limit < Duration::from_millis(1) || self.time_limit > LONGEST {
            return wrong("a time limit lies between a millisecond and a day");
        }
        if self.batch_size == 0 {
            return wrong("a batch holds at least one document: set batch_size to 1 or more");
        }
        self.rate.map_or(Ok(()), Rate::check).map_err(|error| error.with_context("class", self.name.escape_debug()))
    }
}

/// Whether it can be a label in metrics, a part of a comment and of a token.
pub(crate) fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
}

/// The classes of a manager, the most urgent first.
///
/// The default is what most services need:
///
/// | class | weight | reserved | beside more urgent ones | time limit | batch | waits at most | ages after |
/// |---|---|---|---|---|---|---|---|
/// | `critical` | 8 | 1 | | 60 s | 1000 | 1000 | 10 s |
/// | `high` | 4 | 0 | as many as there are slots | 30 s | 500 | 1000 | 8 s |
/// | `normal` | 2 | 0 | as many as there are slots | 15 s | 100 | 1000 | 5 s |
/// | `low` | 1 | 0 | one at a time | 5 s | 10 | 1000 | 2 s |
///
/// One operation of `low` at a time, while there is other work, leaves a small server's processors to those whom somebody waits for. It is for each manager: on a server of 32 processors with two managers
/// [`max_beside_urgent`](Class::max_beside_urgent) may well be 8.
///
/// ```
/// use mongo_workload::{Class, Classes};
///
/// let mut report = Class::new("reports");
/// report.max_concurrent = 2;
/// let mut classes: Vec<Class> = Classes::default().iter().cloned().collect();
/// classes.push(report);
/// let classes = Classes::new(classes)?;
/// assert_eq!(classes.iter().last().map(|class| class.name.as_str()), Some("reports"));
/// # Ok::<(), mongo_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Classes(Vec<Class>);

/// A class of a [`Classes`], by its place in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ClassIndex(pub(crate) usize);

impl Classes {
    /// Checks classes, of which the first is the most urgent.
    ///
    /// # Errors
    /// `InvalidInput` for no class at all, two of one name, or a field out of range; the message names the class.
    pub fn new(classes: Vec<Class>) -> Result<Self> {
        if classes.is_empty() || classes.len() > MOST_CLASSES {
            return Err(Error::invalid("a manager has between 1 and 64 classes"));
        }
        for (position, class) in classes.iter().enumerate() {
            class.check()?;
            if classes[..position].iter().any(|other| other.name == class.name) {
                return Err(Error::invalid("two classes have one name").with_context("class", &class.name));
            }
        }
        Ok(Self(classes))
    }

    /// The classes, the most urgent first.
    pub fn iter(&self) -> std::slice::Iter<'_, Class> {
        self.0.iter()
    }

    pub(crate) fn find(&self, name: &str) -> Result<ClassIndex> {
        let position = self.0.iter().position(|class| class.name == name);
        position.map(ClassIndex).ok_or_else(|| {
            let known: Vec<&str> = self.0.iter().map(|class| class.name.as_str()).collect();
            Error::invalid("no class has this name")
                .with_context("class", name.escape_debug())
                .with_context("known", known.join(" "))
        })
    }

    /// The next less urgent class, if there is one.
    pub(crate) fn below(&self, index: ClassIndex) -> Option<ClassIndex> {
        (index.0 + 1 < self.0.len()).then_some(ClassIndex(index.0 + 1))
    }
}

impl std::ops::Index<ClassIndex> for Classes {
    type Output = Class;

    /// An index comes from [`find`](Classes::find) or [`below`](Classes::below) of the same classes.
    fn index(&self, index: ClassIndex) -> &Class {
        &self.0[index.0]
    }
}

impl<'a> IntoIterator for &'a Classes {
    type Item = &'a Class;
    type IntoIter = std::slice::Iter<'a, Class>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl Default for Classes {
    fn default() -> Self {
        let class = |name: &str, weight: NonZeroU32, time_limit, batch_size, ages_after| Class {
            weight,
            time_limit: Duration::from_secs(time_limit),
            batch_size,
            ages_after: Duration::from_secs(ages_after),
            ..Class::new(name)
        };
        let one = NonZeroU32::MIN;
        Self(vec![
            // So that what somebody waits for never waits for the end of a long scan.
            Class { reserved: 1, ..class("critical", one.saturating_add(7), 60, 1000, 10) },
            class("high", one.saturating_add(3), 30, 500, 8),
            class("normal", one.saturating_add(1), 15, 100, 5),
            // What nobody waits for leaves processors to what somebody does.
            Class { max_beside_urgent: 1, ..class("low", one, 5, 10, 2) },
        ])
    }
}

/// The longest that an operation may be given: a day.
pub(crate) const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
/// How long after its last work the reservation of a class stands.
pub const RESERVED_FOR: Duration = Duration::from_secs(5);
const MOST_CLASSES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_classes_are_those_that_were_asked_for() {
        let classes = Classes::default();
        assert_eq!(Classes::new(classes.0.clone()).unwrap(), classes);
        let told: Vec<_> =
            classes.iter().map(|class| (class.name.as_str(), class.time_limit.as_secs(), class.batch_size)).collect();
        assert_eq!(told, [("critical", 60, 1000), ("high", 30, 500), ("normal", 15, 100), ("low", 5, 10)]);
    }

    #[cfg(feature = "serde")]
    #[test]
    fn a_class_is_read_from_a_file_with_times_in_seconds() {
        let text = r#"{ "name": "reports", "weight": 3, "time_limit": 0.25, "rate": { "per_second": 10.0, "burst": 5 }, "observe_only": ["rate", "time_limit"] }"#;
        let class: Class = serde_json::from_str(text).unwrap();
        assert_eq!((class.time_limit, class.ages_after), (Duration::from_millis(250), Duration::from_secs(5)));
        assert!(!class.enforces(Rule::Rate) && !class.enforces(Rule::TimeLimit) && class.enforces(Rule::Queue));
        assert_eq!(serde_json::from_str::<Class>(&serde_json::to_string(&class).unwrap()).unwrap(), class);
        for wrong in [r#"{ "time_limit": -1 }"#, r#"{ "time_limit": "5s" }"#, r#"{ "timelimit": 5 }"#] {
            assert!(serde_json::from_str::<Class>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_wrong_field_is_named_with_its_class() {
        let refused = |change: fn(&mut Class)| {
            let mut class = Class::new("reports");
            change(&mut class);
            Classes::new(vec![class]).unwrap_err().to_string()
        };
        for (what, error) in [
            ("name", refused(|class| class.name = "two words".to_owned())),
            ("max_concurrent", refused(|class| class.max_concurrent = 0)),
            ("max_beside_urgent", refused(|class| class.max_beside_urgent = 0)),
            ("reserved", refused(|class| class.reserved = 65)),
            ("reserved", refused(|class| (class.reserved, class.max_beside_urgent) = (2, 1))),
            ("time limit", refused(|class| class.time_limit = Duration::ZERO)),
            ("batch_size", refused(|class| class.batch_size = 0)),
            ("rate", refused(|class| class.rate = Some(Rate::new(f64::NAN, 1)))),
            ("burst", refused(|class| class.rate = Some(Rate::new(1.0, 0)))),
        ] {
            assert!(error.contains(what) && error.contains("class: "), "{error}");
        }
        let twice = Classes::new(vec![Class::new("a"), Class::new("a")]).unwrap_err();
        assert!(twice.to_string().contains("one name"), "{twice}");
        assert!(Classes::new(Vec::new()).is_err());
        let unknown = Classes::default().find("urgent").unwrap_err();
        assert!(unknown.to_string().contains("critical high normal low"), "{unknown}");
    }
}

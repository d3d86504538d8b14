//! When a host wants its backups made: cron schedules in a time zone, without overlap.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use croner::{
    Cron,
    parser::{CronParser, Seconds, Year},
};
use jiff::{Timestamp, tz::TimeZone};
use mongo_core::{
    CancellationToken, Error, Result,
    clock::{Clock, SystemClock},
};

/// A cron schedule in a time zone.
///
/// Five fields: minute, hour, day of month, month, day of week, as `0 3 * * *` or `*/15 8-18 * * MON-FRI`; also `L`, `#`, and `@daily` and its
/// siblings. A fixed time that a change to summer time leaves out is made up for as soon as the gap ends, and one that comes twice in autumn counts once.
///
/// ```
/// use std::time::{Duration, SystemTime};
/// use mongo_backup::Schedule;
///
/// let nightly = Schedule::new("0 3 * * *", "Europe/Berlin")?;
/// // 2026-11-21 06:00 UTC; three in the morning in Berlin is two in UTC then.
/// let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_240_800);
/// let next = nightly.next_after(now)?;
/// assert_eq!(next.duration_since(now)?, Duration::from_secs(20 * 3600));
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Schedule {
    cron: Cron,
    zone: TimeZone,
    text: String,
}

impl Schedule {
    /// The schedule of an expression in a time zone of the IANA database, as `UTC` or `Europe/Berlin`.
    ///
    /// # Errors
    /// `InvalidInput` for an expression that is none or never comes true, or an unknown zone.
    pub fn new(expression: &str, zone: &str) -> Result<Self> {
        let wrong = |what: &'static str, value: &str| Error::invalid(what).with_context("got", value.escape_debug());
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let cron = parser.parse(expression).map_err(|error| {
            wrong("this is no cron expression of five fields, as 0 3 * * *", expression).with_source(error.to_string())
        })?;
        let zone_found = TimeZone::get(zone)
            .map_err(|error| wrong("there is no such time zone, as Europe/Berlin", zone).with_source(error.to_string()))?;
        let schedule = Self { cron, zone: zone_found, text: format!("{expression} in {zone}") };
        // The thirtieth of February is a good expression and never comes.
        schedule.next_after(SystemTime::UNIX_EPOCH).map_err(|error| error.wrap("the schedule never comes true"))?;
        Ok(schedule)
    }

    /// The first time after `moment`.
    ///
    /// # Errors
    /// `InvalidInput` when there is none, or the calendar ends.
    pub fn next_after(&self, moment: SystemTime) -> Result<SystemTime> {
        let beyond = |error: String| Error::invalid("the calendar has no such time").with_source(error);
        let start = Timestamp::try_from(moment).map_err(|error| beyond(error.to_string()))?.to_zoned(self.zone.clone());
        let next = self.cron.find_next_occurrence(&start, false).map_err(|error| beyond(error.to_string()))?;
        Ok(next.timestamp().into())
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Schedule({})", self.text)
    }
}

/// What to do about times that passed while the host was down or the work before took too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum MissedRuns {
    /// Make up for them once, at once, however many there were.
    #[default]
    Once,
    /// Wait for the next time.
    Skip,
}

/// Does work whenever a schedule says so, one run at a time.
///
/// ```no_run
/// # async fn f(deployment: mongo_core::Deployment, repository: mongo_backup::Repository) -> mongo_backup::Result<()> {
/// use mongo_backup::{Backup, Schedule, Scheduler};
///
/// let last = repository.snapshots().await?.snapshots.last().map(|snapshot| snapshot.started.to_system_time());
/// let scheduler = Scheduler::new(Schedule::new("0 3 * * *", "UTC")?);
/// scheduler
///     .run(last, async |_| {
///         if let Err(error) = async { Backup::builder(&deployment, &repository).build()?.run().await }.await {
///             eprintln!("the nightly backup failed: {}", error.report());
///         }
///     })
///     .await
/// # }
/// ```
#[derive(Debug)]
#[must_use]
pub struct Scheduler {
    schedule: Schedule,
    missed: MissedRuns,
    clock: Arc<dyn Clock>,
    cancel: CancellationToken,
}

impl Scheduler {
    /// A scheduler that makes up for missed runs once.
    pub fn new(schedule: Schedule) -> Self {
        Self { schedule, missed: MissedRuns::Once, clock: Arc::new(SystemClock::new()), cancel: CancellationToken::new() }
    }

    /// Sets what to do about missed runs.
    pub fn missed_runs(mut self, missed: MissedRuns) -> Self {
        self.missed = missed;
        self
    }

    /// Takes the time from `clock`.
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Ends when `token` is cancelled, after the run that is under way.
    pub fn cancellation(mut self, token: CancellationToken) -> Self {
        self.cancel = token;
        self
    }

    /// Calls `work` with each time that is due, until it is cancelled. The next run does not begin before the last has ended; times that
    /// passed meanwhile are missed runs. `last` is when the work was last done, as far as the host knows: times since then were missed too.
    ///
    /// # Errors
    /// `InvalidInput` when the calendar has ended. What `work` fails with is its own business.
    ///
    /// # Cancel safety
    /// Dropping the future drops a run that is under way.
    pub async fn run(self, last: Option<SystemTime>, mut work: impl AsyncFnMut(SystemTime)) -> Result<()> {
        let mut done_until = last.unwrap_or_else(|| self.clock.wall());
        while !self.cancel.is_cancelled() {
            let mut due = self.schedule.next_after(done_until)?;
            let now = self.clock.wall();
            if due <= now {
                let next = self.schedule.next_after(now)?;
                match self.missed {
                    MissedRuns::Once => {
                        work(due).await;
                        done_until = self.clock.wall().min(next).max(now);
                        continue;
                    }
                    MissedRuns::Skip => due = next,
                }
            }
            if !self.wait_until(due).await {
                break;
            }
            work(due).await;
            done_until = due;
        }
        Ok(())
    }

    /// False if it was cancelled. The wall clock is looked at now and then: it can be set, and a machine can sleep.
    async fn wait_until(&self, due: SystemTime) -> bool {
        while let Ok(left) = due.duration_since(self.clock.wall()) {
            if left.is_zero() {
                break;
            }
            tokio::select! {
                () = self.cancel.cancelled() => return false,
                () = tokio::time::sleep(left.min(LOOK_EVERY)) => {}
            }
        }
        !self.cancel.is_cancelled()
    }
}

const LOOK_EVERY: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use mongo_core::clock::ManualClock;

    use super::*;

    fn at(text: &str) -> SystemTime {
        text.parse::<Timestamp>().unwrap().into()
    }

    fn next(expression: &str, zone: &str, after: &str) -> String {
        let next = Schedule::new(expression, zone).unwrap().next_after(at(after)).unwrap();
        Timestamp::try_from(next).unwrap().to_string()
    }

    #[test]
    fn times_are_those_of_the_zone() {
        assert_eq!(next("0 3 * * *", "Europe/Berlin", "2026-11-21T06:00:00Z"), "2026-11-22T02:00:00Z");
        assert_eq!(next("0 3 * * *", "UTC", "2026-11-21T03:00:00Z"), "2026-11-22T03:00:00Z");
        assert_eq!(next("0 12 * * MON", "America/New_York", "2026-07-01T00:00:00Z"), "2026-07-06T16:00:00Z");
        // Half past two does not exist on this night in Berlin, and comes twice on the other.
        assert_eq!(next("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00:00Z"), "2026-03-29T01:00:00Z");
        assert_eq!(next("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z"), "2026-10-25T00:30:00Z");
        assert_eq!(next("30 2 * * *", "Europe/Berlin", "2026-10-25T00:30:00Z"), "2026-10-26T01:30:00Z");
    }

    #[test]
    fn what_is_no_schedule_is_refused() {
        for (expression, zone) in
            [("", "UTC"), ("* * * *", "UTC"), ("61 * * * *", "UTC"), ("0 3 * * *", "Nowhere"), ("0 0 30 2 *", "UTC")]
        {
            assert!(Schedule::new(expression, zone).is_err(), "{expression} {zone}");
        }
    }

    /// The hours at which work was done, which takes `takes` hours, until it was done `runs` times.
    async fn runs(missed: MissedRuns, last: &str, now: &str, takes: u64, runs: usize) -> Vec<String> {
        let clock = Arc::new(ManualClock::at(at(now)));
        let cancel = CancellationToken::new();
        let done = Mutex::new(Vec::new());
        let scheduler = Scheduler::new(Schedule::new("0 * * * *", "UTC").unwrap())
            .missed_runs(missed)
            .clock(Arc::<ManualClock>::clone(&clock))
            .cancellation(cancel.clone());
        let turning = Arc::<ManualClock>::clone(&clock);
        let hands = tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                turning.advance(LOOK_EVERY);
            }
        });
        scheduler
            .run(Some(at(last)), async |due| {
                let mut done = done.lock().unwrap();
                done.push(Timestamp::try_from(due).unwrap().to_string());
                clock.advance(Duration::from_secs(takes * 3600));
                if done.len() == runs {
                    cancel.cancel();
                }
            })
            .await
            .unwrap();
        hands.abort();
        done.into_inner().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn missed_runs_are_made_up_for_once_or_skipped() {
        let (last, now) = ("2026-01-01T00:00:00Z", "2026-01-01T05:30:00Z");
        assert_eq!(runs(MissedRuns::Once, last, now, 0, 2).await, ["2026-01-01T01:00:00Z", "2026-01-01T06:00:00Z"]);
        assert_eq!(runs(MissedRuns::Skip, last, now, 0, 2).await, ["2026-01-01T06:00:00Z", "2026-01-01T07:00:00Z"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_that_takes_longer_than_the_time_between_does_not_overlap_with_the_next() {
        let (last, now) = ("2026-01-01T00:30:00Z", "2026-01-01T00:30:00Z");
        assert_eq!(
            runs(MissedRuns::Skip, last, now, 3, 3).await,
            ["2026-01-01T01:00:00Z", "2026-01-01T05:00:00Z", "2026-01-01T09:00:00Z"]
        );
        assert_eq!(runs(MissedRuns::Once, last, now, 3, 2).await, ["2026-01-01T01:00:00Z", "2026-01-01T02:00:00Z"]);
    }
}

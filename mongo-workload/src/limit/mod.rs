//! How many operations of a kind may be under way at once, found out from how they fare.
//!
//! A server that is not busy takes as long for each of ten operations as for one; a busy one takes twice as long for twice as many, and then more of them under way
//! gain nothing but waiting inside the server, where nobody's class counts. So what is looked for is the number at which half as many would be clearly faster, and
//! it is found by trying: as soon as operations take longer than they [usually](Controller::usual) do, half as many are let in for a moment.
//! If those are faster, the others have waited for each other and the limit goes down; if not, the server has become slower for everybody, that is what is usual from now
//! on, and the limit stays. No latency that was ever seen is taken for the truth for good, so neither a constant timeout nor an old record misleads.
//!
//! Like the scheduler this is a state machine without a clock. How slow everything is comes from [`Costs`], whatever the mix of operations.
//! A server that says itself that it has too much, and operations that time out, lower the limit without a trial.

#[cfg(test)]
mod tests;

use std::{num::NonZeroU32, time::Duration};

use crate::{
    cost::{Costs, ShapeKey},
    schedule::Access,
};

/// Bounds for slots that find their number by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct AdaptiveSlots {
    /// Never fewer. Default 1.
    pub least: NonZeroU32,
    /// At the beginning. Default 8.
    pub initial: NonZeroU32,
    /// Never more, unless more are reserved. Default 50: those for reads and those for writes are then as many as a client of the driver has connections to a server (`maxPoolSize`), so that
    /// nobody waits in the driver, where there are no classes.
    pub most: NonZeroU32,
}

impl Default for AdaptiveSlots {
    fn default() -> Self {
        let one = NonZeroU32::MIN;
        Self { least: one, initial: one.saturating_add(7), most: one.saturating_add(49) }
    }
}

impl AdaptiveSlots {
    /// Never fewer than `least` and never more than `most`, which counts as `least` if it is less.
    pub fn between(least: NonZeroU32, most: NonZeroU32) -> Self {
        let most = most.max(least);
        Self { least, initial: Self::default().initial.clamp(least, most), most }
    }

    /// Sets the number at the beginning.
    #[must_use]
    pub fn with_initial(mut self, initial: NonZeroU32) -> Self {
        self.initial = initial;
        self
    }
}

/// How an operation fared, as far as it says something about the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fared {
    /// How long it took is how long such operations take.
    Well,
    /// Its time was up.
    Late,
    /// The server refused it because it has too much to do.
    Overload,
    /// It says nothing: it was wrong, or given up.
    Unknown,
}

/// An operation that has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    pub(crate) shape: ShapeKey,
    pub(crate) began: Duration,
    pub(crate) took: Duration,
    pub(crate) fared: Fared,
    /// Operations of its kind that were under way, itself included.
    pub(crate) running: u32,
    /// Whether others of its kind wait.
    pub(crate) others_wait: bool,
}

/// Finds the limit of one kind of access.
#[derive(Debug)]
pub(crate) struct Controller {
    access: Access,
    settings: AdaptiveSlots,
    /// Not fewer for now.
    floor: u32,
    limit: f64,
    /// By how much it grows next time, in relation to itself.
    growth: f64,
    /// How slow everything is while little is under way.
    usual: Option<f64>,
    phase: Phase,
    window: Window,
    /// What began before says nothing: another limit held then.
    since: Duration,
    /// Not before then is the same tried once more.
    trial_after: Duration,
    /// Trials one after the other that found nothing, and how slow everything was when the last of them began.
    vain_trials: u32,
    vain_at: f64,
    /// When the last trial ended, and how many windows have ended since.
    tried: Duration,
    windows: u32,
    grow_after: Duration,
    /// How often it went down, one time after the other, without having grown twice.
    vain_growth: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Steady,
    /// Half of those that were under way are let in. Until no more are, nothing is measured.
    Emptying(Trial),
    Trying(Trial),
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Trial {
    /// So many were under way, and so many are let in now.
    of: f64,
    half: u32,
    /// How slow everything was then.
    slowness: f64,
    /// How long operations took then.
    took: Duration,
    until: Duration,
}

impl Trial {
    /// What is written below of twice as many, for as many more as these are.
    fn scaled(self, of_twice: f64) -> f64 {
        of_twice.powf((self.of / f64::from(self.half)).log2())
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Window {
    since: Duration,
    count: u32,
    late: u32,
    /// All of them together.
    took: Duration,
    /// The most that were under way.
    peak: u32,
    others_waited: bool,
}

impl Controller {
    pub(crate) fn new(access: Access, settings: AdaptiveSlots) -> Self {
        let AdaptiveSlots { least, initial, most } = settings;
        Self {
            access,
            settings,
            floor: least.get(),
            limit: f64::from(initial.get().clamp(least.get(), most.get().max(least.get()))),
            growth: FASTEST,
            usual: None,
            phase: Phase::Steady,
            window: Window::default(),
            since: Duration::ZERO,
            trial_after: Duration::ZERO,
            vain_trials: 0,
            vain_at: 0.0,
            tried: Duration::ZERO,
            windows: 0,
            grow_after: Duration::ZERO,
            vain_growth: 0,
        }
    }

    /// How many may be under way.
    pub(crate) fn slots(&self) -> u32 {
        match self.phase {
            Phase::Steady => whole(self.limit).max(self.floor),
            Phase::Emptying(trial) | Phase::Trying(trial) => trial.half.max(self.floor),
        }
    }

    /// Sets that there are no fewer than so many for now, whatever comes out.
    pub(crate) fn set_floor(&mut self, floor: u32) {
        self.floor = floor.max(self.settings.least.get());
    }

    /// A trial that begins by waiting until no more than half are under way: not for long, as nobody begins meanwhile, and some may be under way for minutes.
    fn trial(&self, now: Duration, of: f64, slowness: f64, took: Duration) -> Trial {
        let half = whole(of / 2.0).max(self.floor).max(1);
        Trial { of, half, slowness, took, until: now + (took * 3).clamp(SHORTEST_TRIAL, LONGEST_TRIAL) }
    }

    /// Ends a trial that takes too long. To be called now and then also when nothing ends.
    pub(crate) fn tick(&mut self, now: Duration, costs: &mut Costs) {
        if let Phase::Emptying(trial) | Phase::Trying(trial) = self.phase
            && now >= trial.until
        {
            // So slow, or so seldom, that it would be half as many for too long. It stays unknown whether that is usual, so it is; else nothing would ever change again.
            self.phase = Phase::Steady;
            self.usual = Some(trial.slowness);
            self.was_vain(now, trial);
            self.measure_anew(now, costs);
        }
    }

    pub(crate) fn is_trying(&self) -> bool {
        self.phase != Phase::Steady
    }

    /// Learns from an operation that has ended. [`slots`](Self::slots) may be another number then.
    pub(crate) fn ended(&mut self, now: Duration, ended: Ended, costs: &mut Costs) {
        self.window.peak = self.window.peak.max(ended.running);
        self.window.others_waited |= ended.others_wait;
        match self.phase {
            Phase::Emptying(trial) if ended.running.saturating_sub(1) <= self.slots() => {
                self.phase = Phase::Trying(Trial { until: now + LONGEST_TRIAL, ..trial });
                self.measure_anew(now, costs);
            }
            _ => self.tick(now, costs),
        }
        if ended.began < self.since || matches!(self.phase, Phase::Emptying(_)) {
            return;
        }
        match ended.fared {
            Fared::Overload => return self.back_off(now, costs),
            Fared::Late => {
                self.window.count += 1;
                self.window.late += 1;
            }
            Fared::Well => {
                self.window.count += u32::from(costs.count(ended.shape, self.access, ended.took));
                self.window.took += ended.took;
            }
            Fared::Unknown => {}
        }
        if self.window.count >= ENOUGH && now >= self.window.since + SHORTEST_WINDOW {
            let window = std::mem::replace(&mut self.window, Window { since: now, ..Window::default() });
            let slowness = costs.end_window(self.access);
            if window.late * 10 >= window.count {
                self.back_off(now, costs);
            } else if let Some(slowness) = slowness {
                self.decide(now, window, slowness, costs);
            }
        }
    }

    fn decide(&mut self, now: Duration, window: Window, slowness: f64, costs: &mut Costs) {
        if let Phase::Trying(trial) = self.phase {
            self.phase = self.conclude(now, trial, slowness);
            return self.measure_anew(now, costs);
        }
        self.windows = self.windows.saturating_add(1);
        let took = window.took / window.count.max(1);
        let usual = self.usual.unwrap_or(slowness);
        let ratio = slowness / usual;
        let peak = f64::from(window.peak);
        // What is kept for somebody may be empty.
        let is_full = window.others_waited && window.peak.saturating_add(self.floor - 1) >= whole(self.limit);
        // Faster than usual although there is no room left: how much faster it would be with room is not known any more. And what was found out once does not hold for ever.
        let is_old = now >= self.tried + LONGEST_BELIEF && self.windows >= SHORTEST_BELIEF;
        let is_outdated = is_full && (self.usual.is_none() || ratio * SUSPICIOUS < 1.0 || is_old);
        // Faster is believed at once, or nearly: a window is a sample. Slower only as far as the world changes slowly, unless it is tried out.
        let drift = if ratio < 1.0 {
            ratio.max(0.25).sqrt()
        } else if peak <= self.limit / 2.0 {
            ratio.min(SLOW_DRIFT)
        } else {
            1.0
        };
        self.usual = Some(usual * drift);
        let is_suspicious = ratio > SUSPICIOUS;
        let of = peak.min(self.limit);
        if of < f64::from(self.floor) + 1.0 {
            // Fewer cannot be tried.
            self.usual = Some(slowness);
        } else if is_outdated || is_suspicious && (now >= self.trial_after || slowness > self.vain_at * SUSPICIOUS) {
            self.phase = Phase::Emptying(self.trial(now, of, slowness, took));
            return self.measure_anew(now, costs);
        } else if is_suspicious {
            self.growth = SLOWEST;
            return;
        }
        if is_full && now >= self.grow_after {
            let grown = (self.limit * (1.0 + self.growth)).max(self.limit + 1.0);
            self.limit = grown.min(f64::from(self.settings.most.get()));
            if self.growth > SLOWEST {
                self.vain_growth = 0;
            }
            self.growth = (self.growth * 2.0).min(FASTEST);
            // What was tried before was with fewer.
            self.trial_after = now;
            self.measure_anew(now, costs);
        }
    }

    /// Half as many took this long.
    fn conclude(&mut self, now: Duration, trial: Trial, slowness: f64) -> Phase {
        (self.tried, self.windows) = (now, 0);
        let slower = trial.slowness / slowness;
        let worthless = trial.scaled(WORTHLESS);
        if slower <= worthless {
            self.usual = Some(slowness);
            self.was_vain(now, trial);
            return Phase::Steady;
        }
        self.usual = Some(self.usual.map_or(slowness, |usual| usual.min(slowness)));
        (self.vain_trials, self.trial_after) = (0, now);
        self.rest(now);
        let half = f64::from(trial.half);
        if slower > trial.scaled(FULL) && trial.half > self.floor {
            // They wait for each other as well: further down at once. One more than half is left if they do not, so that a server of few processors does not wait for the next to come.
            self.lower_to(half + 1.0);
            return Phase::Emptying(self.trial(now, half, slowness, trial.took));
        }
        self.lower_to((trial.of * worthless / slower).max(half));
        Phase::Steady
    }

    fn was_vain(&mut self, now: Duration, trial: Trial) {
        (self.tried, self.windows) = (now, 0);
        self.vain_at = trial.slowness;
        self.vain_trials = (self.vain_trials + 1).min(6);
        self.trial_after = now + BETWEEN_TRIALS * self.vain_trials;
    }

    /// Too much is under way, without a doubt. What began before cannot say so once more.
    fn back_off(&mut self, now: Duration, costs: &mut Costs) {
        self.phase = Phase::Steady;
        self.lower_to(self.limit * BACK_OFF);
        self.rest(now);
        self.measure_anew(now, costs);
    }

    /// Does not grow for a while: for longer if it grew in vain.
    fn rest(&mut self, now: Duration) {
        self.vain_growth = (self.vain_growth + 1).min(LONGEST_REST);
        self.grow_after = now + REST * self.vain_growth;
    }

    fn lower_to(&mut self, limit: f64) {
        self.limit = limit.min(self.limit).max(f64::from(self.floor));
        self.growth = SLOWEST;
    }

    fn measure_anew(&mut self, now: Duration, costs: &mut Costs) {
        costs.forget_window(self.access);
        self.since = now;
        self.window = Window { since: now, ..Window::default() };
    }
}

/// So many whole slots.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the cast saturates, and a part of a slot is none")]
pub(crate) fn whole(slots: f64) -> u32 {
    slots as u32
}

/// Operations that a window has at least.
const ENOUGH: u32 = 10;
const SHORTEST_WINDOW: Duration = Duration::from_millis(250);
/// So much slower than usual is looked into.
const SUSPICIOUS: f64 = 1.3;
/// Twice as many under way that are so much slower do a third more, or less: not worth that everybody waits.
const WORTHLESS: f64 = 1.5;
/// In a window in which little is under way, so much slower may become usual: doubling within half a minute.
const SLOW_DRIFT: f64 = 1.005;
/// Twice as many under way that are so much slower do not do more at all.
const FULL: f64 = 1.75;
const BACK_OFF: f64 = 0.7;
const SLOWEST: f64 = 0.1;
const FASTEST: f64 = 1.0;
const LONGEST_TRIAL: Duration = Duration::from_secs(5);
/// Of waiting until no more than half are under way: three times as long as they take, but not less than this.
const SHORTEST_TRIAL: Duration = Duration::from_millis(500);
/// After trials that found nothing, times their number.
const BETWEEN_TRIALS: Duration = Duration::from_secs(5);
/// Where all slots are wanted, a trial is made at least so often.
const LONGEST_BELIEF: Duration = Duration::from_secs(10);
/// In windows: between two trials of slow operations the limit can change.
const SHORTEST_BELIEF: u32 = 4;
/// After it went down the limit does not grow for so long, and for so many times that if it grows in vain.
const REST: Duration = Duration::from_secs(1);
const LONGEST_REST: u32 = 3;

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::class::ClassIndex;

/// A server with so many processors, clients that always want more, and time that is made up.
struct Simulation {
    controller: Controller,
    costs: Costs,
    random: fastrand::Rng,
    now: Duration,
    /// By when they end; with what each takes and when it began.
    running: BTreeMap<(Duration, u64), (ShapeKey, Duration, Fared)>,
    next_id: u64,
    /// What operations take when they do not wait for each other, and how often each kind comes.
    shapes: Vec<(&'static str, Duration, u32)>,
    processors: f64,
    clients: u32,
    /// The share of time that operations take at random, more or less.
    noise: f64,
    timeout: Duration,
    most_at_once: Option<u32>,
    done: u64,
}

impl Simulation {
    fn new(processors: f64, clients: u32) -> Self {
        Self {
            controller: Controller::new(
                Access::Read,
                AdaptiveSlots { most: NonZeroU32::new(100).unwrap(), ..AdaptiveSlots::default() },
            ),
            costs: Costs::default(),
            random: fastrand::Rng::with_seed(7),
            now: Duration::ZERO,
            running: BTreeMap::new(),
            next_id: 0,
            shapes: vec![("find", Duration::from_millis(4), 1)],
            processors,
            clients,
            noise: 0.5,
            timeout: Duration::from_secs(60),
            most_at_once: None,
            done: 0,
        }
    }

    fn under_way(&self) -> u32 {
        u32::try_from(self.running.len()).unwrap()
    }

    fn begin_all(&mut self) {
        while self.under_way() < self.controller.slots().min(self.clients) {
            let mut pick = self.random.u32(0..self.shapes.iter().map(|(.., often)| often).sum());
            let (name, takes, _) = *self
                .shapes
                .iter()
                .find(|(.., often)| {
                    let found = pick < *often;
                    pick = pick.wrapping_sub(*often);
                    found
                })
                .unwrap();
            let key = self.costs.key(ClassIndex(0), Access::Read, name);
            let busy = ((self.running.len() + 1) as f64 / self.processors).max(1.0);
            let random = 1.0 + self.noise * (self.random.f64() * 2.0 - 1.0);
            let mut took = takes.mul_f64(busy * random).max(Duration::from_micros(1));
            let mut fared = Fared::Well;
            if self.most_at_once.is_some_and(|most| self.under_way() >= most) {
                (took, fared) = (Duration::from_micros(200), Fared::Overload);
            } else if took > self.timeout {
                (took, fared) = (self.timeout, Fared::Late);
            }
            self.running.insert((self.now + took, self.next_id), (key, self.now, fared));
            self.next_id += 1;
        }
    }

    /// Goes on for so long and gives the mean of the slots and what was done in a second.
    fn run(&mut self, time: Duration) -> (f64, f64) {
        let (until, began, before, mut slots) = (self.now + time, self.now, self.done, 0.0);
        while self.now < until {
            self.begin_all();
            let ((end, _), (shape, began, fared)) = self.running.pop_first().unwrap();
            slots += f64::from(self.controller.slots()) * (end - self.now).as_secs_f64();
            self.now = end;
            let took = self.now - began;
            if fared == Fared::Well {
                self.costs.learn(shape, took);
                self.done += 1;
            }
            let running = self.under_way() + 1;
            let ended = Ended { shape, began, took, fared, running, others_wait: running < self.clients };
            self.controller.ended(self.now, ended, &mut self.costs);
        }
        let elapsed = (self.now - began).as_secs_f64();
        (slots / elapsed, (self.done - before) as f64 / elapsed)
    }
}

const SECOND: Duration = Duration::from_secs(1);

#[track_caller]
fn suits(slots: f64, processors: f64) {
    assert!(slots >= processors * 0.9 && slots <= processors * 1.6 + 0.5, "{slots} slots for {processors} processors");
}

#[test]
fn the_limit_finds_what_the_server_can_do_at_once() {
    for processors in [1.0, 2.0, 6.0, 20.0, 60.0] {
        let mut simulation = Simulation::new(processors, 200);
        simulation.run(5 * SECOND);
        let (slots, rate) = simulation.run(20 * SECOND);
        suits(slots, processors);
        let peak = processors / 0.004;
        assert!(rate > 0.93 * peak, "{rate} of {peak} a second with {processors} processors");
    }
}

#[test]
fn within_five_seconds_it_follows_a_server_that_can_do_less_or_more() {
    let mut simulation = Simulation::new(32.0, 200);
    simulation.run(10 * SECOND);
    for processors in [8.0, 2.0, 16.0, 50.0, 4.0] {
        simulation.processors = processors;
        simulation.run(5 * SECOND);
        let (slots, _) = simulation.run(2 * SECOND);
        suits(slots, processors);
    }
}

#[test]
fn a_server_that_becomes_slower_for_everybody_keeps_its_slots() {
    let mut simulation = Simulation::new(16.0, 200);
    simulation.run(10 * SECOND);
    for millis in [40, 4, 10] {
        simulation.shapes[0].1 = Duration::from_millis(millis);
        simulation.run(5 * SECOND);
        let (slots, _) = simulation.run(5 * SECOND);
        suits(slots, 16.0);
    }
}

#[test]
fn another_mix_of_operations_is_not_congestion() {
    let mut simulation = Simulation::new(12.0, 200);
    simulation.shapes = vec![("find", Duration::from_millis(2), 20), ("scan", Duration::from_millis(200), 1)];
    simulation.run(20 * SECOND);
    for often in [20, 1, 200, 5] {
        simulation.shapes[0].2 = often;
        let (slots, _) = simulation.run(10 * SECOND);
        suits(slots, 12.0);
    }
}

#[test]
fn operations_that_all_time_out_do_not_look_steady() {
    let mut simulation = Simulation::new(8.0, 100);
    simulation.run(10 * SECOND);
    simulation.shapes[0].1 = 10 * SECOND;
    simulation.timeout = Duration::from_millis(100);
    simulation.run(5 * SECOND);
    let (slots, _) = simulation.run(5 * SECOND);
    assert!(slots < 1.5, "{slots} slots for a server that does nothing");
    simulation.shapes[0].1 = Duration::from_millis(4);
    simulation.run(5 * SECOND);
    suits(simulation.run(2 * SECOND).0, 8.0);
}

#[test]
fn a_server_that_says_it_has_too_much_is_given_less() {
    let mut simulation = Simulation::new(1000.0, 200);
    simulation.most_at_once = Some(20);
    simulation.run(5 * SECOND);
    let (slots, rate) = simulation.run(20 * SECOND);
    assert!((10.0..=21.0).contains(&slots), "{slots} slots where 20 are let in");
    assert!(rate > 0.7 * 20.0 / 0.004, "{rate} a second");
}

#[test]
fn nothing_is_tried_while_nothing_is_slower_than_usual() {
    // Sixteen clients on a server for a hundred: they are never held up.
    let mut simulation = Simulation::new(100.0, 16);
    simulation.run(5 * SECOND);
    for _ in 0..600 {
        simulation.run(SECOND / 10);
        assert!(simulation.controller.slots() >= 16, "{:?}", simulation.controller);
    }
}

#[test]
fn more_than_are_wanted_are_not_believed_to_be_possible() {
    let mut simulation = Simulation::new(100.0, 4);
    simulation.run(60 * SECOND);
    assert!(simulation.controller.slots() <= 8, "{:?}", simulation.controller);
}

#[test]
fn a_trial_ends_also_when_nothing_else_does() {
    let mut simulation = Simulation::new(8.0, 100);
    simulation.run(10 * SECOND);
    let trial = simulation.controller.trial(simulation.now, 8.0, 1.0, Duration::from_millis(4));
    simulation.controller.phase = Phase::Emptying(trial);
    assert_eq!(simulation.controller.slots(), 4);
    simulation.controller.tick(simulation.now + Duration::from_millis(400), &mut simulation.costs);
    assert_eq!(simulation.controller.slots(), 4);
    simulation.controller.tick(simulation.now + Duration::from_millis(500), &mut simulation.costs);
    assert!(simulation.controller.slots() > 4 && !simulation.controller.is_trying());
}

#[test]
fn where_operations_are_slow_the_limit_still_finds_its_way() {
    let mut simulation = Simulation::new(50.0, 200);
    simulation.shapes[0].1 = 2 * SECOND;
    simulation.controller = Controller::new(Access::Read, AdaptiveSlots::default().with_initial(NonZeroU32::MIN));
    simulation.run(600 * SECOND);
    assert!(simulation.controller.limit > 25.0, "{:?}", simulation.controller);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn whatever_happens_the_limit_stays_within_its_bounds_and_heals(
        least in 1_u32..4,
        more in 0_u32..60,
        steps in prop::collection::vec((1_u32..50, 1_u64..50, 1_u32..100, prop::option::of(1_u32..30)), 1..6),
        seed in any::<u64>(),
    ) {
        let bound = |number| NonZeroU32::new(number).unwrap();
        let mut simulation = Simulation::new(4.0, 50);
        simulation.controller = Controller::new(Access::Read, AdaptiveSlots::between(bound(least), bound(least + more)));
        simulation.random = fastrand::Rng::with_seed(seed);
        simulation.timeout = SECOND;
        for (processors, millis, clients, most_at_once) in steps {
            simulation.processors = f64::from(processors);
            simulation.shapes[0].1 = Duration::from_millis(millis);
            simulation.clients = clients;
            simulation.most_at_once = most_at_once.map(|most| most.max(least));
            for _ in 0..20 {
                simulation.run(SECOND / 5);
                prop_assert!((least..=least + more).contains(&simulation.controller.slots()));
            }
        }
        (simulation.processors, simulation.clients, simulation.most_at_once) = (8.0, 200, None);
        simulation.shapes[0].1 = Duration::from_millis(4);
        simulation.run(15 * SECOND);
        let (slots, _) = simulation.run(5 * SECOND);
        let best = 8.0_f64.clamp(f64::from(least), f64::from(least + more));
        prop_assert!(slots >= best * 0.85 && slots <= (best * 1.7 + 0.5).max(f64::from(least)), "{slots} where {best} is best");
    }
}

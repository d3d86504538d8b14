//! The bounds that the scheduler promises, on arrivals at random.

use std::{collections::BTreeMap, num::NonZeroU32};

use proptest::prelude::*;

use super::*;

const NEVER: Duration = Duration::from_secs(1_000_000_000);

fn class(name: &str, weight: u32) -> Class {
    Class {
        weight: NonZeroU32::new(weight).unwrap(),
        max_concurrent: 1000,
        max_queued: 100_000,
        ages_after: NEVER,
        ..Class::new(name)
    }
}

fn classes(weights: &[u32]) -> Vec<Class> {
    weights.iter().enumerate().map(|(position, weight)| class(&format!("c{position}"), *weight)).collect()
}

fn read(class: usize, cost: f64) -> Request {
    Request { class: ClassIndex(class), access: Access::Read, cost, memory_bytes: 0 }
}

/// Work that takes as many milliseconds as it costs.
struct Simulation {
    scheduler: Scheduler,
    now: Duration,
    /// By when it ends.
    running: BTreeMap<(Duration, WaitingId), (Begun, f64)>,
    /// What everything that waits will really cost.
    real: BTreeMap<WaitingId, f64>,
    begun: Vec<Begun>,
    /// What was begun for each class, at its real cost.
    served: Vec<f64>,
}

impl Simulation {
    fn new(classes: Vec<Class>, slots: u32) -> Self {
        let count = classes.len();
        let scheduler = Scheduler::new(&Classes::new(classes).unwrap(), [slots; 2], Strictness::Strict);
        Self {
            scheduler,
            now: Duration::ZERO,
            running: BTreeMap::new(),
            real: BTreeMap::new(),
            begun: Vec::new(),
            served: vec![0.0; count],
        }
    }

    fn arrive(&mut self, request: Request, real: f64) -> WaitingId {
        self.try_arrive(request, real).unwrap()
    }

    fn try_arrive(&mut self, request: Request, real: f64) -> Result<WaitingId, Refusal> {
        if let Some(refusal) = self.scheduler.refusal(&request) {
            return Err(refusal);
        }
        let id = self.scheduler.arrive(self.now, request);
        self.real.insert(id, real);
        Ok(id)
    }

    fn begin_all(&mut self) {
        while let Some(begun) = self.scheduler.next(self.now) {
            let real = self.real.remove(&begun.id).unwrap();
            self.served[begun.request.class.0] += real;
            self.running.insert((self.now + Duration::from_secs_f64(real / 1000.0), begun.id), (begun, real));
            self.begun.push(begun);
        }
    }

    /// Goes to the next end of something, or says that nothing runs.
    fn step(&mut self) -> bool {
        let Some(((at, _), (begun, real))) = self.running.pop_first() else { return false };
        self.now = at;
        self.scheduler.end(self.now, &begun, real);
        true
    }
}

#[test]
fn work_is_shared_by_weight_and_not_by_number() {
    // The second class asks for a hundred times as much each time.
    let mut simulation = Simulation::new(classes(&[1, 1, 2]), 4);
    let costs = [1.0, 100.0, 10.0];
    for _ in 0..20_000 {
        for (position, cost) in costs.into_iter().enumerate() {
            while simulation.scheduler.counts(ClassIndex(position)).1 < 8 {
                simulation.arrive(read(position, cost), cost);
            }
        }
        simulation.begin_all();
        simulation.step();
    }
    let all: f64 = simulation.served.iter().sum();
    let shares: Vec<f64> = simulation.served.iter().map(|served| served / all).collect();
    for (share, due) in shares.iter().zip([0.25, 0.25, 0.5]) {
        assert!((share - due).abs() < 0.02, "{shares:?}");
    }
}

#[test]
fn shares_hold_though_all_estimates_are_wrong() {
    let mut random = fastrand::Rng::with_seed(7);
    let mut simulation = Simulation::new(classes(&[3, 1]), 4);
    for _ in 0..20_000 {
        for position in 0..2 {
            while simulation.scheduler.counts(ClassIndex(position)).1 < 8 {
                // The second is taken for cheap and is dear.
                let (believed, real) = if position == 0 { (50.0, 1.0 + random.f64()) } else { (1.0, 50.0 + random.f64() * 50.0) };
                simulation.arrive(read(position, believed), real);
            }
        }
        simulation.begin_all();
        simulation.step();
    }
    let share = simulation.served[0] / (simulation.served[0] + simulation.served[1]);
    assert!((share - 0.75).abs() < 0.05, "{share}");
}

#[test]
fn whoever_comes_back_from_having_nothing_to_do_is_neither_paid_nor_punished() {
    let mut simulation = Simulation::new(classes(&[1, 1]), 1);
    for _ in 0..100 {
        simulation.arrive(read(0, 10.0), 10.0);
    }
    for _ in 0..50 {
        simulation.begin_all();
        simulation.step();
    }
    // Half of it has been done; now the other class comes, with as much.
    for _ in 0..50 {
        simulation.arrive(read(1, 10.0), 10.0);
    }
    simulation.begun.clear();
    for _ in 0..20 {
        simulation.begin_all();
        simulation.step();
    }
    let of_the_first = simulation.begun.iter().filter(|begun| begun.request.class == ClassIndex(0)).count();
    assert!((9..=11).contains(&of_the_first), "{of_the_first} of 20");
}

#[test]
fn a_reserved_slot_is_kept_for_who_wants_it_and_lent_otherwise() {
    let mut both = classes(&[1, 1]);
    both[0].reserved = 2;
    let mut simulation = Simulation::new(both, 4);
    for _ in 0..10 {
        simulation.arrive(read(1, 1000.0), 1000.0);
    }
    // Nobody has asked for what is reserved: it is lent.
    simulation.begin_all();
    assert_eq!(simulation.scheduler.counts(ClassIndex(1)), (4, 6));
    // From now on it is kept.
    simulation.arrive(read(0, 1.0), 1.0);
    assert!(simulation.step());
    simulation.begin_all();
    assert_eq!(simulation.scheduler.counts(ClassIndex(0)).0, 1);
    while simulation.scheduler.counts(ClassIndex(1)).0 > 2 || simulation.scheduler.counts(ClassIndex(0)).0 > 0 {
        assert!(simulation.step());
        simulation.begin_all();
    }
    assert_eq!(simulation.scheduler.counts(ClassIndex(1)).0, 2, "two slots are free and kept");
    simulation.now += RESERVED_FOR;
    simulation.begin_all();
    assert_eq!(simulation.scheduler.counts(ClassIndex(1)).0, 4);
}

#[test]
fn who_only_reads_keeps_no_slots_for_writes() {
    let mut both = classes(&[1, 1]);
    both[0].reserved = 3;
    let mut simulation = Simulation::new(both, 4);
    simulation.arrive(read(0, 1.0), 1.0);
    for _ in 0..4 {
        for access in Access::ALL {
            simulation.arrive(Request { access, ..read(1, 1.0) }, 1.0);
        }
    }
    simulation.begin_all();
    assert_eq!(simulation.scheduler.running(Access::Write), 4);
    assert_eq!(simulation.scheduler.running(Access::Read), 2, "one of each, and two slots are kept");
}

#[test]
fn limits_of_a_class_hold_it_back_and_nobody_else() {
    let mut both = classes(&[10, 1]);
    (both[0].max_concurrent, both[0].max_queued, both[0].max_memory_bytes) = (2, 3, 100);
    let mut simulation = Simulation::new(both, 8);
    for _ in 0..5 {
        simulation.arrive(read(0, 1.0), 1.0);
        simulation.begin_all();
    }
    assert_eq!(simulation.scheduler.counts(ClassIndex(0)), (2, 3));
    assert_eq!(simulation.try_arrive(read(0, 1.0), 1.0), Err(Refusal::QueueFull));
    let large = Request { memory_bytes: 101, ..read(0, 1.0) };
    assert_eq!(simulation.try_arrive(large, 1.0), Err(Refusal::TooLarge));
    for _ in 0..10 {
        simulation.arrive(read(1, 1.0), 1.0);
    }
    simulation.begin_all();
    assert_eq!(simulation.scheduler.counts(ClassIndex(1)).0, 6);
}

#[test]
fn beside_what_is_urgent_only_so_much_begins_and_alone_as_much_as_there_are_slots() {
    let mut all = classes(&[1, 1, 1]);
    all[1].max_beside_urgent = 2;
    let mut simulation = Simulation::new(all, 8);
    let running = |simulation: &Simulation| [0, 1, 2].map(|class| simulation.scheduler.counts(ClassIndex(class)).0);
    for class in [1, 2, 1, 2, 1, 2, 1, 2].into_iter().chain([1; 20]) {
        simulation.arrive(read(class, 1000.0), 1000.0);
    }
    simulation.begin_all();
    assert_eq!(running(&simulation), [0, 4, 4], "what comes after it is not more urgent");
    // One write is enough: it is one server.
    simulation.arrive(Request { access: Access::Write, ..read(0, 2000.0) }, 2000.0);
    simulation.begin_all();
    for _ in 0..8 {
        simulation.step();
        simulation.begin_all();
    }
    assert_eq!(running(&simulation), [1, 2, 0]);
    // For a while after the last of it.
    while running(&simulation)[0] > 0 {
        simulation.step();
        simulation.begin_all();
    }
    assert_eq!(running(&simulation)[1], 2);
    simulation.now += RESERVED_FOR;
    for _ in 0..10 {
        simulation.arrive(read(1, 1000.0), 1000.0);
    }
    simulation.begin_all();
    assert_eq!(running(&simulation), [0, 8, 0]);
}

#[test]
fn classes_that_have_reserved_more_than_there_is_share_all_of_it() {
    let mut both = classes(&[1, 1]);
    both.iter_mut().for_each(|class| class.reserved = 10);
    let mut simulation = Simulation::new(both, 12);
    for position in [0, 1].into_iter().cycle().take(40) {
        simulation.arrive(read(position, 1.0), 1.0);
    }
    simulation.begin_all();
    assert_eq!(simulation.scheduler.running(Access::Read), 12);
    // Sums of reservations are no trap either.
    let mut huge = classes(&[1, 1]);
    huge.iter_mut().for_each(|class| (class.max_concurrent, class.reserved) = (u32::MAX, u32::MAX));
    let mut simulation = Simulation::new(huge, 4);
    for position in [0, 1].into_iter().cycle().take(10) {
        simulation.arrive(read(position, 1.0), 1.0);
    }
    simulation.begin_all();
    assert_eq!(simulation.scheduler.running(Access::Read), 4);
}

#[test]
fn slots_that_became_fewer_are_no_bar_to_who_has_reserved_some_of_them() {
    for (strictness, expected) in [(Strictness::Strict, 0), (Strictness::BarReserved, 2)] {
        let mut both = classes(&[1, 1]);
        both[0].reserved = 2;
        let mut simulation = Simulation::new(both, 8);
        simulation.scheduler.set_strictness(Access::Read, strictness);
        for _ in 0..20 {
            simulation.arrive(read(1, 10.0), 10.0);
        }
        simulation.begin_all();
        simulation.scheduler.set_limit(Access::Read, 3);
        for _ in 0..5 {
            simulation.arrive(read(0, 10.0), 10.0);
        }
        simulation.begin_all();
        assert_eq!(simulation.scheduler.counts(ClassIndex(0)).0, expected, "{strictness:?}");
        assert_eq!(simulation.scheduler.counts(ClassIndex(1)).0, 8);
    }
}

#[test]
fn what_is_reserved_is_not_for_the_aged_of_others() {
    let mut both = classes(&[1, 1]);
    both[0].reserved = 1;
    both[1].ages_after = Duration::ZERO;
    let mut simulation = Simulation::new(both, 4);
    // It has had work a moment ago.
    simulation.arrive(read(0, 1.0), 1.0);
    simulation.begin_all();
    simulation.step();
    for _ in 0..20 {
        simulation.arrive(read(1, 10.0), 10.0);
    }
    simulation.begin_all();
    assert_eq!(simulation.scheduler.counts(ClassIndex(1)).0, 3);
}

#[test]
fn a_reservation_does_not_put_back_who_comes_new() {
    // The first is always busy in its reserved slots, and far ahead of its share.
    let mut all = classes(&[1, 8, 8]);
    all[0].reserved = 2;
    let mut simulation = Simulation::new(all, 4);
    let refill = |simulation: &mut Simulation, positions: &[usize]| {
        for position in positions {
            while simulation.scheduler.counts(ClassIndex(*position)).1 < 4 {
                simulation.arrive(read(*position, 10.0), 10.0);
            }
        }
        simulation.begin_all();
        simulation.step();
    };
    for _ in 0..4000 {
        refill(&mut simulation, &[0, 1]);
    }
    simulation.served = vec![0.0; 3];
    for _ in 0..2000 {
        refill(&mut simulation, &[0, 1, 2]);
    }
    let (old, new) = (simulation.served[1], simulation.served[2]);
    assert!((old - new).abs() < 0.05 * old, "{:?}", simulation.served);
}

#[test]
fn neither_reads_nor_writes_of_a_class_take_all_that_it_may_have() {
    let mut one = classes(&[1]);
    (one[0].max_concurrent, one[0].max_queued, one[0].max_memory_bytes) = (2, 4, 100);
    let mut simulation = Simulation::new(one, 8);
    let mut begun = [0, 0];
    for round in 0..200_u64 {
        simulation.now += Duration::from_micros(1);
        for access in Access::ALL {
            // Those that write need so much memory that they run alone.
            let memory_bytes = if access == Access::Write { 80 } else { 40 };
            let request = Request { access, memory_bytes, ..read(0, 1.0) };
            // Each kind has a queue of its own.
            if let Err(refusal) = simulation.try_arrive(request, 1.0) {
                assert!(refusal == Refusal::QueueFull && round > 2);
            }
        }
        simulation.begin_all();
        simulation.step();
    }
    for done in &simulation.begun {
        begun[done.request.access.position()] += 1;
    }
    assert!(begun.iter().all(|count| *count > 40), "{begun:?}");
}

#[test]
fn where_one_place_is_left_neither_reads_nor_writes_of_a_class_starve() {
    // The first keeps all slots for reads busy. Of the second one may be under way beside it, and there are always writes.
    let mut both = classes(&[8, 1]);
    (both[1].max_beside_urgent, both[1].ages_after) = (1, Duration::from_millis(50));
    let mut simulation = Simulation::new(both, 2);
    let done = |simulation: &Simulation, access| {
        simulation.begun.iter().filter(|begun| begun.request.class == ClassIndex(1) && begun.request.access == access).count()
    };
    for _ in 0..2000 {
        while simulation.scheduler.counts(ClassIndex(0)).1 < 4 {
            simulation.arrive(read(0, 3.0), 3.0);
        }
        while simulation.scheduler.counts(ClassIndex(1)).1 < 8 {
            let access = if simulation.scheduler.pools[0].flows[1].waiting.len() < 4 { Access::Read } else { Access::Write };
            simulation.arrive(Request { access, ..read(1, 5.0) }, 5.0);
        }
        simulation.begin_all();
        simulation.step();
    }
    let (reads, writes) = (done(&simulation, Access::Read), done(&simulation, Access::Write));
    assert!(reads > 20 && writes > 20, "{reads} reads and {writes} writes");
}

#[test]
fn what_the_aged_cannot_use_is_not_saved_up_for_them() {
    let mut both = classes(&[1, 1]);
    (both[1].max_concurrent, both[1].ages_after) = (1, Duration::ZERO);
    let mut simulation = Simulation::new(both, 10);
    for _ in 0..1000 {
        for (class, cost) in [(0, 10.0), (1, 100_000.0)] {
            while simulation.scheduler.counts(ClassIndex(class)).1 < 12 {
                // It is taken for cheap, so that the lane does not owe much for the one that is under way.
                simulation.arrive(read(class, 1.0), cost);
            }
        }
        simulation.begin_all();
        assert!(simulation.scheduler.pools[0].lane <= 0.0, "{}", simulation.scheduler.pools[0].lane);
        simulation.step();
    }
}

#[test]
fn who_is_held_back_pays_once_for_what_was_taken_for_cheap() {
    // A fifteenth is due to the last, which is half of a slot.
    let mut all = classes(&[8, 4, 2, 1]);
    all[3].max_concurrent = 1;
    let mut simulation = Simulation::new(all, 8);
    for _ in 0..60_000 {
        for (class, real) in [10.0, 10.0, 10.0, 1000.0].into_iter().enumerate() {
            while simulation.scheduler.counts(ClassIndex(class)).1 < 8 {
                simulation.arrive(read(class, 10.0), real);
            }
        }
        simulation.begin_all();
        simulation.step();
    }
    let all: f64 = simulation.served.iter().sum();
    assert!((simulation.served[3] / all - 1.0 / 15.0).abs() < 0.008, "{:?}", simulation.served);
}

#[test]
fn what_a_class_could_not_use_is_not_saved_up_for_later() {
    let mut all = classes(&[1, 1, 1]);
    all[1].max_beside_urgent = 1;
    let mut simulation = Simulation::new(all, 8);
    let refill = |simulation: &mut Simulation, steps: u32, is_urgent: bool| {
        for _ in 0..steps {
            if is_urgent && simulation.scheduler.counts(ClassIndex(0)) == (0, 0) {
                simulation.arrive(read(0, 10.0), 10.0);
            }
            for class in [1, 2] {
                while simulation.scheduler.counts(ClassIndex(class)).1 < 30 {
                    simulation.arrive(read(class, 10.0), 10.0);
                }
            }
            simulation.begin_all();
            simulation.step();
        }
    };
    refill(&mut simulation, 5000, true);
    assert!(simulation.served[2] > 4.0 * simulation.served[1], "it is held back: {:?}", simulation.served);
    while simulation.step() {}
    simulation.now += RESERVED_FOR;
    simulation.served = vec![0.0; 3];
    refill(&mut simulation, 400, false);
    let (one, other) = (simulation.served[1], simulation.served[2]);
    assert!((one - other).abs() < 0.1 * other, "{:?}", simulation.served);
}

#[test]
fn memory_of_a_class_is_given_back() {
    let mut one = classes(&[1]);
    one[0].max_memory_bytes = 100;
    let mut simulation = Simulation::new(one, 8);
    for _ in 0..3 {
        simulation.arrive(Request { memory_bytes: 60, ..read(0, 1.0) }, 1.0);
    }
    for left in [2, 1, 0] {
        simulation.begin_all();
        assert_eq!(simulation.scheduler.counts(ClassIndex(0)), (1, left));
        assert!(simulation.step());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// |Wᵢ/wᵢ − Wⱼ/wⱼ| ≤ (D + 1)·(cᵢ/wᵢ + cⱼ/wⱼ) at every moment.
    #[test]
    fn no_class_is_further_ahead_of_another_than_the_bound(
        weights in proptest::collection::vec(1_u32..9, 2..5),
        slots in 1_u32..17,
        largest in proptest::collection::vec(1_u32..101, 5),
        seed: u64,
    ) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut simulation = Simulation::new(classes(&weights), slots);
        for _ in 0..600 {
            for (position, largest) in largest.iter().enumerate().take(weights.len()) {
                while simulation.scheduler.counts(ClassIndex(position)).1 <= slots {
                    let cost = f64::from(random.u32(1..=*largest));
                    simulation.arrive(read(position, cost), cost);
                }
            }
            simulation.begin_all();
            // Some go away, and some go on in another class.
            let given_up = simulation.scheduler.pools[0].flows.iter().enumerate().filter_map(|(class, flow)| Some((class, *flow.waiting.keys().next()?)));
            let given_up: Vec<_> = given_up.filter(|_| random.u8(0..10) == 0).collect();
            for (class, id) in given_up {
                prop_assert!(simulation.scheduler.withdraw(id, ClassIndex(class), Access::Read));
                let cost = simulation.real.remove(&id).unwrap();
                let other = (class + 1) % weights.len();
                if random.bool() && cost <= f64::from(largest[other]) {
                    simulation.arrive(read(other, cost), cost);
                }
            }
            for i in 0..weights.len() {
                for j in 0..i {
                    let (wi, wj) = (f64::from(weights[i]), f64::from(weights[j]));
                    let apart = (simulation.served[i] / wi - simulation.served[j] / wj).abs();
                    let bound = f64::from(slots + 1) * (f64::from(largest[i]) / wi + f64::from(largest[j]) / wj);
                    prop_assert!(apart <= bound + 1e-6, "{apart} > {bound}");
                }
            }
            simulation.step();
        }
    }

    /// Nobody waits longer than A + (20·(k + m)/D + 2)·c.
    #[test]
    fn nobody_waits_longer_than_the_bound(
        mut weights in proptest::collection::vec(1_u32..1000, 2..5),
        slots in 1_u32..40,
        ages_after in proptest::collection::vec(1_u64..3000, 5),
        seed: u64,
    ) {
        // So heavy that the others would never have their turn.
        weights[0] = 10_000_000;
        let mut random = fastrand::Rng::with_seed(seed);
        let mut all = classes(&weights);
        for (class, age) in all.iter_mut().zip(&ages_after) {
            class.ages_after = Duration::from_millis(*age);
        }
        let mut simulation = Simulation::new(all, slots);
        let largest = 100_u32;
        // When each arrived, and in which class.
        let mut arrived = BTreeMap::new();
        for _ in 0..800 {
            // More than can be done, mostly of the first class.
            while simulation.real.len() < slots as usize + 20 {
                let position = if random.u8(..) < 230 { 0 } else { random.usize(0..weights.len()) };
                let cost = f64::from(random.u32(1..=largest));
                let id = simulation.arrive(read(position, cost), cost);
                arrived.insert(id, (simulation.now, position));
            }
            simulation.begin_all();
            // Somebody goes away, and sometimes comes back in another class.
            if random.u8(0..10) == 0
                && let Some(id) = simulation.real.keys().nth(random.usize(0..simulation.real.len().max(1))).copied()
                && let Some((_, position)) = arrived.remove(&id)
            {
                prop_assert!(simulation.scheduler.withdraw(id, ClassIndex(position), Access::Read));
                let cost = simulation.real.remove(&id).unwrap();
                let other = (position + 1) % weights.len();
                if random.bool() {
                    arrived.insert(simulation.arrive(read(other, cost), cost), (simulation.now, other));
                }
            }
            simulation.step();
        }
        // When each became aged and when it began. What still waits may begin now at the earliest.
        let mut begun: BTreeMap<WaitingId, Duration> = arrived.keys().map(|id| (*id, simulation.now)).collect();
        begun.extend(simulation.begun.iter().map(|begun| (begun.id, arrived[&begun.id].0 + begun.waited)));
        let times: Vec<(Duration, Duration)> = arrived
            .iter()
            .map(|(id, (since, position))| (*since + Duration::from_millis(ages_after[*position]), begun[id]))
            .collect();
        let at_once = f64::from((slots / 10).max(1));
        for (aged, began) in &times {
            // Those that aged in the same moment may be before it.
            let before = times.iter().filter(|(others, theirs)| others <= aged && theirs >= aged).count().saturating_sub(1);
            let rounds = 20.0 * (before as f64 + at_once) / f64::from(slots) + 2.0;
            let bound = *aged + Duration::from_millis(u64::from(largest)).mul_f64(rounds);
            prop_assert!(*began <= bound, "{began:?} > {bound:?} with {before} in the lane before it");
        }
    }

    /// Under arrivals, withdrawals, ends and changes of the limit at random: nothing is lost or begun twice, every limit holds, and no slot is idle
    /// while somebody could have it.
    #[test]
    fn nothing_is_lost_and_no_slot_idles(
        limits in proptest::collection::vec((1_u32..5, 1_u32..20, 0_u32..3), 1..4),
        slots in 1_u32..12,
        seed: u64,
    ) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut all = classes(&vec![1; limits.len()]);
        for (class, (max_concurrent, max_queued, reserved)) in all.iter_mut().zip(&limits) {
            class.max_concurrent = *max_concurrent;
            class.max_queued = *max_queued;
            class.max_beside_urgent = random.u32(1..5);
            class.reserved = (*reserved).min(*max_concurrent).min(class.max_beside_urgent);
            class.max_memory_bytes = 100;
            class.ages_after = Duration::from_millis(random.u64(1..500));
        }
        let beside: Vec<u32> = all.iter().map(|class| class.max_beside_urgent).collect();
        let reserves = limits.iter().any(|(_, _, reserved)| *reserved > 0);
        let mut simulation = Simulation::new(all, slots);
        let mut waiting: Vec<(WaitingId, Request)> = Vec::new();
        let (mut arrived, mut withdrawn) = (0, 0);
        for _ in 0..400 {
            match random.u8(0..10) {
                0..=4 => {
                    let access = if random.bool() { Access::Read } else { Access::Write };
                    let request = Request {
                        access,
                        memory_bytes: random.u64(0..100),
                        ..read(random.usize(0..limits.len()), f64::from(random.u32(1..100)))
                    };
                    match simulation.try_arrive(request, request.cost) {
                        Ok(id) => {
                            arrived += 1;
                            waiting.push((id, request));
                        }
                        Err(refusal) => {
                            let alike = waiting.iter().filter(|(_, other)| (other.class, other.access) == (request.class, request.access));
                            prop_assert_eq!(refusal, Refusal::QueueFull);
                            prop_assert!(alike.count() >= limits[request.class.0].1 as usize);
                        }
                    }
                }
                5 if !waiting.is_empty() => {
                    let (id, request) = waiting.swap_remove(random.usize(0..waiting.len()));
                    prop_assert!(simulation.scheduler.withdraw(id, request.class, request.access));
                    prop_assert!(!simulation.scheduler.withdraw(id, request.class, request.access));
                    simulation.real.remove(&id);
                    withdrawn += 1;
                }
                6 => simulation.scheduler.set_limit(Access::Read, random.u32(0..12)),
                _ => drop(simulation.step()),
            }
            let before: Vec<u32> = Access::ALL.map(|access| simulation.scheduler.running(access)).to_vec();
            let of_each: Vec<u32> = (0..limits.len()).map(|class| simulation.scheduler.counts(ClassIndex(class)).0).collect();
            simulation.begin_all();
            for (position, before) in of_each.into_iter().enumerate() {
                let is_urgent = |class: usize| simulation.scheduler.counts(ClassIndex(class)) != (0, 0);
                let most = if (0..position).any(is_urgent) { beside[position] } else { u32::MAX };
                prop_assert!(simulation.scheduler.counts(ClassIndex(position)).0 <= most.max(before));
            }
            waiting.retain(|(id, _)| simulation.real.contains_key(id));
            for (access, before) in Access::ALL.into_iter().zip(before) {
                let (running, limit) = (simulation.scheduler.running(access), simulation.scheduler.limit(access));
                prop_assert!(running <= limit.max(before));
                let heads = limits.iter().enumerate().filter(|(position, _)| {
                    let head = |access: Access| {
                        let of_it = waiting.iter().filter(|(_, request)| request.access == access && request.class.0 == *position);
                        of_it.min_by_key(|(id, _)| *id)
                    };
                    let has_room = |request: &Request| simulation.scheduler.classes[*position].has_room(request.memory_bytes);
                    // A younger one leaves its class's memory to an older one that has a slot and waits for that, and the last place of its class to one that has aged.
                    let gives_way = |id: WaitingId| {
                        Access::ALL.into_iter().filter(|other| *other != access).any(|other| {
                            let has_slot = simulation.scheduler.running(other) < simulation.scheduler.limit(other);
                            let class = &simulation.scheduler.classes[*position];
                            let is_aged = simulation.scheduler.oldest(ClassIndex(*position)).is_some_and(|since| since + class.ages_after <= simulation.now);
                            let is_last = class.running + 1 >= class.most_now && is_aged;
                            head(other).is_some_and(|(older, request)| *older < id && (is_last || has_slot && !has_room(request)))
                        })
                    };
                    head(access).is_some_and(|(id, request)| has_room(request) && !gives_way(*id))
                });
                prop_assert!(reserves || heads.count() == 0 || running >= limit, "{running} of {limit}");
            }
            for (position, (max_concurrent, _, _)) in limits.iter().enumerate() {
                let state = &simulation.scheduler.classes[position];
                prop_assert!(state.running <= *max_concurrent && state.memory_bytes <= 100);
            }
        }
        while simulation.step() {
            simulation.begin_all();
        }
        // What is kept for nobody's sake is given away in time.
        simulation.now += RESERVED_FOR;
        simulation.begin_all();
        while simulation.step() {
            simulation.begin_all();
        }
        prop_assert_eq!(simulation.begun.len() + withdrawn, arrived);
        for position in 0..limits.len() {
            prop_assert_eq!(simulation.scheduler.counts(ClassIndex(position)), (0, 0));
            prop_assert_eq!(simulation.scheduler.classes[position].memory_bytes, 0);
        }
    }
}

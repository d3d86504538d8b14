//! Who is next: start-time fair queueing with a lane for the aged.
//!
//! This is a state machine without a clock, without locks and without waiting: it is told what happened and when, and says what may begin.
//!
//! Reads and writes have slots of their own, a [`Pool`] each. In a pool every class has a virtual time, which grows by the cost of what is begun
//! divided by the class's weight; whoever is furthest behind is next. A class that comes back from having nothing to do begins at the
//! pool's own virtual time, which is that of whoever is furthest behind of those that wait and that their own limits let begin: it neither pays for its absence nor is paid.
//! Costs are estimates when work begins and are put right when it ends. (Goyal, Vin, Cheng: *Start-time Fair Queueing*, 1996; with depth: Jin, Chase, Kaur, 2004.)
//!
//! For two classes *i* and *j* that have work waiting all the while, with *W* the cost of what was begun for them, *w* their weights, *c* their largest
//! costs, believed or real, and *D* the slots of the pool, as long as nothing of them has aged: |Wᵢ/wᵢ − Wⱼ/wⱼ| ≤ (D + 1)·(cᵢ/wᵢ + cⱼ/wⱼ).
//!
//! Who has waited longer than its class's `ages_after` stands in one lane with all others of its pool to whom that has happened, by age alone. The lane has a
//! share ρ of a twentieth: for everything that ends, that share of its cost is credited to the lane, and what begins in the lane is charged to it. While the lane does not owe
//! anything it gets the next free slot, as long as fewer than *m* = max(1, a tenth of the slots) are busy with aged work. Its classes pay for it like for all their work, so that the lane
//! changes the order within a class that gets a twentieth anyway, and gives a twentieth to those that would get less.
//!
//! *The bound.* All *D* slots are busy while somebody waits who may begin, so what ends in a time *t* has cost at least *D*·(*t* − *c*), if every operation ends within *c*. When one becomes aged
//! the lane owes *m*·*c* at most, as it began each of at most *m* when it owed nothing; the *k* before it cost *k*·*c* at most. So after *t* = *c* + (*k* + *m*)·*c*/(ρ·*D*) it is its turn, and within another *c* a slot
//! is free: nobody waits longer than *A* + (20·(*k* + *m*)/*D* + 2)·*c*, where *A* is its class's `ages_after`, unless its own class's limits hold it back: these stand above
//! everything, and so do reservations, whose slots *D* does not count.

#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, time::Duration};

use crate::class::{Class, ClassIndex, Classes, RESERVED_FOR, Rule};

/// What an operation does, which decides where it gets its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Access {
    /// It only reads.
    Read,
    /// It writes, or may write.
    Write,
}

impl Access {
    pub(crate) const ALL: [Self; 2] = [Self::Read, Self::Write];

    pub(crate) fn position(self) -> usize {
        match self {
            Self::Read => 0,
            Self::Write => 1,
        }
    }
}

/// Names what waits. Later ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct WaitingId(u64);

/// What asks to begin.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) class: ClassIndex,
    pub(crate) access: Access,
    /// What it will cost, by experience. In any unit, the same for all.
    pub(crate) cost: f64,
    pub(crate) memory_bytes: u64,
}

/// Something that may begin now. It must be [ended](Scheduler::end).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Begun {
    pub(crate) id: WaitingId,
    pub(crate) request: Request,
    /// How long it waited.
    pub(crate) waited: Duration,
    /// Whether it went before its turn, by age.
    pub(crate) aged: bool,
    /// Whether it began although there was no slot for it, as slots only observe.
    pub(crate) beyond_slots: bool,
    /// Whether it began although a limit of its class that only observes had no room for it.
    pub(crate) beyond: Option<Rule>,
}

/// Who could begin in a pool.
#[derive(Clone, Copy)]
struct Candidate {
    access: Access,
    position: usize,
    since: Duration,
    aged: bool,
}

/// Decides who is next.
#[derive(Debug)]
pub(crate) struct Scheduler {
    classes: Vec<ClassState>,
    pools: [Pool; 2],
    next_id: u64,
}

#[derive(Debug)]
struct ClassState {
    weight: f64,
    max_concurrent: u32,
    max_beside_urgent: u32,
    /// Which of the two holds now.
    most_now: u32,
    reserved: u32,
    max_memory_bytes: u64,
    max_queued: u32,
    ages_after: Duration,
    holds_concurrency: bool,
    holds_memory: bool,
    running: u32,
    memory_bytes: u64,
    queued: u32,
}

/// Whom the number of slots holds up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strictness {
    /// Everybody.
    Strict,
    /// Everybody but who has slots reserved and not so many of them: the number is found out, and goes down while others have all of them.
    BarReserved,
    /// Nobody.
    Observes,
}

/// Slots of one kind and who waits for them.
#[derive(Debug)]
struct Pool {
    limit: u32,
    strictness: Strictness,
    running: u32,
    /// Slots that the aged have.
    aged: u32,
    /// What is credited to the lane of the aged, or, below zero, what it owes.
    lane: f64,
    virtual_time: f64,
    flows: Vec<Flow>,
}

/// A class within a pool.
#[derive(Debug, Default)]
struct Flow {
    virtual_time: f64,
    running: u32,
    waiting: BTreeMap<WaitingId, Waiting>,
    /// What all that waits will cost.
    waiting_cost: f64,
    /// When it last had work.
    wanted_at: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    request: Request,
    since: Duration,
}

/// Why something cannot even wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// So many of its class wait already.
    QueueFull,
    /// It needs more memory than its class may ever have.
    TooLarge,
}

impl Scheduler {
    /// With so many slots of each kind.
    pub(crate) fn new(classes: &Classes, slots: [u32; 2], strictness: Strictness) -> Self {
        let states: Vec<ClassState> = classes.iter().map(ClassState::new).collect();
        let pool = |slots: u32| Pool {
            limit: slots.max(1),
            strictness,
            running: 0,
            aged: 0,
            lane: 0.0,
            virtual_time: 0.0,
            flows: states.iter().map(|_| Flow::default()).collect(),
        };
        Self { pools: slots.map(pool), classes: states, next_id: 0 }
    }

    /// Whether the limits of its class say that a request cannot even wait.
    pub(crate) fn refusal(&self, request: &Request) -> Option<Refusal> {
        let class = &self.classes[request.class.0];
        if request.memory_bytes > class.max_memory_bytes {
            return Some(Refusal::TooLarge);
        }
        let pool = &self.pools[request.access.position()];
        let flow = &pool.flows[request.class.0];
        // Who finds a free slot does not wait: the length of a queue is not a limit on what runs.
        let must_wait = !flow.waiting.is_empty() || pool.is_full() || !class.has_room(request.memory_bytes);
        (must_wait && flow.waiting.len() >= class.max_queued as usize).then_some(Refusal::QueueFull)
    }

    /// Lets a request wait. What may begin, perhaps this one, is what [`next`](Self::next) gives.
    pub(crate) fn arrive(&mut self, now: Duration, request: Request) -> WaitingId {
        let class = &mut self.classes[request.class.0];
        let pool = &mut self.pools[request.access.position()];
        let flow = &mut pool.flows[request.class.0];
        class.queued += 1;
        flow.wanted_at = Some(now);
        if flow.waiting.is_empty() {
            flow.virtual_time = flow.virtual_time.max(pool.virtual_time);
        }
        let id = WaitingId(self.next_id);
        self.next_id += 1;
        flow.waiting.insert(id, Waiting { request, since: now });
        flow.waiting_cost += request.cost;
        id
    }

    /// Takes back what waits. False if it does not wait any more.
    pub(crate) fn withdraw(&mut self, id: WaitingId, class: ClassIndex, access: Access) -> bool {
        let flow = &mut self.pools[access.position()].flows[class.0];
        let Some(withdrawn) = flow.waiting.remove(&id) else { return false };
        flow.left(withdrawn.request.cost);
        self.classes[class.0].queued -= 1;
        true
    }

    /// What may begin now. To be asked again until it gives nothing.
    pub(crate) fn next(&mut self, now: Duration) -> Option<Begun> {
        if self.classes.iter().any(|class| class.yields() && class.queued > 0) {
            self.yield_to_urgent(now);
        }
        for access in Access::ALL {
            // What nobody wants is not saved up.
            if self.pools[access.position()].lane > 0.0 && !self.anybody_is_aged(now, access) {
                self.pools[access.position()].lane = 0.0;
            }
        }
        let candidates = Access::ALL.into_iter().filter_map(|access| self.candidate(now, access));
        // Where the limits of a class leave room for only one of a read and a write, the older one has it.
        let chosen = candidates.min_by_key(|candidate| candidate.since)?;
        self.begin(now, chosen)
    }

    /// To be told before it is asked whether something of a class can wait.
    pub(crate) fn look_at(&mut self, class: ClassIndex, now: Duration) {
        if self.classes[class.0].yields() {
            self.yield_to_urgent(now);
        }
    }

    /// Finds out how many of each class may be under way now.
    fn yield_to_urgent(&mut self, now: Duration) {
        let mut anything_urgent = false;
        for position in 0..self.classes.len() {
            let class = &mut self.classes[position];
            let before = class.most_now;
            class.most_now = if anything_urgent { class.max_beside_urgent } else { class.max_concurrent };
            if class.most_now > before {
                self.pools.iter_mut().for_each(|pool| pool.save_nothing_up(position));
            }
            anything_urgent = anything_urgent || self.pools.iter().any(|pool| self.wants(pool, position, now));
        }
    }

    fn anybody_is_aged(&self, now: Duration, access: Access) -> bool {
        self.pools[access.position()].flows.iter().zip(&self.classes).any(|(flow, class)| {
            // Whom the limits of its own class hold up cannot use it.
            let head = flow.waiting.values().next().filter(|head| class.has_room(head.request.memory_bytes));
            head.is_some_and(|head| head.since.saturating_add(class.ages_after) <= now)
        })
    }

    fn candidate(&self, now: Duration, access: Access) -> Option<Candidate> {
        let pool = &self.pools[access.position()];
        if pool.is_full() && pool.strictness == Strictness::Strict {
            return None;
        }
        let kept: u64 = (0..self.classes.len()).map(|class| u64::from(self.kept_for(pool, class, now))).sum();
        let free = match pool.strictness {
            Strictness::Observes => u64::MAX,
            _ => u64::from(pool.limit.saturating_sub(pool.running)),
        };
        let mut fairest: Option<(f64, Candidate)> = None;
        let mut oldest: Option<(Duration, Candidate)> = None;
        for (position, flow) in pool.flows.iter().enumerate() {
            let Some(head) = flow.waiting.values().next() else { continue };
            let class = &self.classes[position];
            if !class.has_room(head.request.memory_bytes) || self.gives_way(now, access, position, head.since) {
                continue;
            }
            let candidate = Candidate { access, position, since: head.since, aged: false };
            let aged_at = head.since.saturating_add(class.ages_after);
            // What is kept for itself is its own. What is kept for others is not, but never are all slots kept, also where there are fewer than
            // classes have reserved.
            let own = u64::from(self.kept_for(pool, position, now));
            let may_have_one = own > 0 || free > (kept - own).min(u64::from(pool.limit) - 1);
            if !may_have_one {
                continue;
            }
            if fairest.is_none_or(|(least, _)| flow.virtual_time < least) {
                fairest = Some((flow.virtual_time, candidate));
            }
            if aged_at <= now && oldest.is_none_or(|(oldest, _)| aged_at < oldest) {
                oldest = Some((aged_at, Candidate { aged: true, ..candidate }));
            }
        }
        match oldest {
            Some((_, candidate)) if pool.lane >= 0.0 && pool.aged < (pool.limit / 10).max(1) => Some(candidate),
            _ => fairest.map(|(_, candidate)| candidate),
        }
    }

    /// Whether what is younger leaves what its class may have to an older operation of the class that is among those for the other kind: one that has a slot there and waits for memory of the class, or one that
    /// has aged and waits for a slot, if only one more of the class may be under way. Whenever a slot became free there, the place would be taken by one of this kind otherwise.
    fn gives_way(&self, now: Duration, access: Access, position: usize, since: Duration) -> bool {
        let class = &self.classes[position];
        Access::ALL.into_iter().filter(|other| *other != access).any(|other| {
            let pool = &self.pools[other.position()];
            let Some(head) = pool.flows[position].waiting.values().next().filter(|head| head.since < since) else { return false };
            let waits_for_memory = !pool.is_full() && !class.has_room(head.request.memory_bytes);
            waits_for_memory || class.has_one_place() && head.since.saturating_add(class.ages_after) <= now
        })
    }

    /// Slots of a pool that nobody but a class may have.
    fn kept_for(&self, pool: &Pool, class: usize, now: Duration) -> u32 {
        if self.wants(pool, class, now) { self.classes[class].reserved.saturating_sub(pool.flows[class].running) } else { 0 }
    }

    /// Whether a class has work in a pool, or had some a while ago.
    fn wants(&self, pool: &Pool, class: usize, now: Duration) -> bool {
        let flow = &pool.flows[class];
        let has_work = flow.running > 0 || !flow.waiting.is_empty();
        has_work || flow.wanted_at.is_some_and(|at| now < at.saturating_add(RESERVED_FOR))
    }

    fn begin(&mut self, now: Duration, chosen: Candidate) -> Option<Begun> {
        let Candidate { access, position, aged, .. } = chosen;
        let pool = &mut self.pools[access.position()];
        // How far whoever is furthest behind has come, of those that their own limits let begin: not of who is begun for its age or its reservation.
        let able = pool.flows.iter().zip(&self.classes).filter(|(flow, class)| !class.holds_back(flow));
        let behind =
            able.filter(|(flow, _)| !flow.waiting.is_empty()).map(|(flow, _)| flow.virtual_time).fold(f64::INFINITY, f64::min);
        if behind.is_finite() {
            pool.virtual_time = pool.virtual_time.max(behind);
        }
        let (id, Waiting { request, since }) = pool.flows[position].waiting.pop_first()?;
        let (flow, class) = (&mut pool.flows[position], &mut self.classes[position]);
        flow.left(request.cost);
        let beyond = class.beyond(request.memory_bytes);
        let beyond_slots = pool.strictness == Strictness::Observes && pool.running >= pool.limit;
        flow.virtual_time += request.cost / class.weight;
        if aged {
            pool.lane -= request.cost;
        }
        flow.running += 1;
        pool.running += 1;
        pool.aged += u32::from(aged);
        class.running += 1;
        class.memory_bytes += request.memory_bytes;
        class.queued -= 1;
        Some(Begun { id, request, waited: now.saturating_sub(since), aged, beyond_slots, beyond })
    }

    /// Ends what was begun; `cost` is what it has really cost.
    pub(crate) fn end(&mut self, now: Duration, begun: &Begun, cost: f64) {
        let Request { class: ClassIndex(position), access, cost: estimated, memory_bytes } = begun.request;
        let was_held_back = self.pools.each_ref().map(|pool| self.classes[position].holds_back(&pool.flows[position]));
        let (class, pool) = (&mut self.classes[position], &mut self.pools[access.position()]);
        let flow = &mut pool.flows[position];
        // What was believed too dear is given back, but not so that the class is ahead of who has waited meanwhile.
        let floor = flow.virtual_time.min(pool.virtual_time);
        flow.virtual_time = (flow.virtual_time + (cost - estimated) / class.weight).max(floor);
        pool.lane += cost * LANE_SHARE;
        if begun.aged {
            pool.lane -= cost - estimated;
        }
        flow.running -= 1;
        pool.running -= 1;
        pool.aged -= u32::from(begun.aged);
        class.running -= 1;
        class.memory_bytes -= memory_bytes;
        pool.flows[position].wanted_at = Some(now);
        for (pool, _) in self.pools.iter_mut().zip(was_held_back).filter(|(_, was_held_back)| *was_held_back) {
            pool.save_nothing_up(position);
        }
        let pool = &mut self.pools[access.position()];
        if pool.running == 0 && pool.flows.iter().all(|flow| flow.waiting.is_empty()) {
            // A quiet pool owes nobody anything, and numbers stay small.
            (pool.virtual_time, pool.lane) = (0.0, 0.0);
            pool.flows.iter_mut().for_each(|flow| flow.virtual_time = 0.0);
        }
    }

    /// Changes how many slots there are. What is under way is not interrupted.
    pub(crate) fn set_limit(&mut self, access: Access, slots: u32) {
        self.pools[access.position()].limit = slots.max(1);
    }

    /// Changes whom it holds up.
    pub(crate) fn set_strictness(&mut self, access: Access, strictness: Strictness) {
        self.pools[access.position()].strictness = strictness;
    }

    pub(crate) fn limit(&self, access: Access) -> u32 {
        self.pools[access.position()].limit
    }

    /// Slots of a kind that classes have reserved and want now.
    pub(crate) fn reserved(&self, access: Access, now: Duration) -> u32 {
        let pool = &self.pools[access.position()];
        (0..self.classes.len()).fold(0_u32, |sum, class| {
            sum.saturating_add(if self.wants(pool, class, now) { self.classes[class].reserved } else { 0 })
        })
    }

    /// Whether anything of a kind waits for a slot, and not for what its own class may have.
    pub(crate) fn anything_waits(&self, access: Access) -> bool {
        let flows = &self.pools[access.position()].flows;
        flows.iter().zip(&self.classes).any(|(flow, class)| !flow.waiting.is_empty() && !class.holds_back(flow))
    }

    pub(crate) fn running(&self, access: Access) -> u32 {
        self.pools[access.position()].running
    }

    /// Under way and waiting of a class.
    pub(crate) fn counts(&self, class: ClassIndex) -> (u32, u32) {
        let class = &self.classes[class.0];
        (class.running, class.queued)
    }

    /// Since when the oldest of a class waits.
    pub(crate) fn oldest(&self, class: ClassIndex) -> Option<Duration> {
        self.pools.iter().filter_map(|pool| pool.flows[class.0].waiting.values().next()).map(|head| head.since).min()
    }

    /// How much of what waits comes before one more of a class, in units of cost for each slot: so long it will wait if everything costs what is believed.
    pub(crate) fn expected_wait(&self, class: ClassIndex, access: Access) -> f64 {
        let pool = &self.pools[access.position()];
        let flow = &pool.flows[class.0];
        if flow.waiting.is_empty() && !pool.is_full() {
            return 0.0;
        }
        let weights: f64 = pool
            .flows
            .iter()
            .zip(&self.classes)
            .enumerate()
            .filter(|(position, (flow, state))| {
                // Who is held back by its own limits leaves its share to the others.
                *position == class.0 || flow.waiting.values().next().is_some_and(|head| state.has_room(head.request.memory_bytes))
            })
            .map(|(_, (_, state))| state.weight)
            .sum();
        let share = self.classes[class.0].weight / weights;
        let state = &self.classes[class.0];
        let most = if state.holds_concurrency { f64::from(state.most_now) } else { f64::INFINITY };
        let slots = (f64::from(pool.limit) * share).min(most).max(1.0);
        // Nor does anybody wait longer than until all that waits is done, who is not held back by limits of its own.
        let all = pool.flows.iter().map(|flow| flow.waiting_cost).sum::<f64>() / f64::from(pool.limit).min(most);
        (flow.waiting_cost / slots).min(all)
    }
}

/// ρ above.
const LANE_SHARE: f64 = 0.05;

impl Pool {
    /// For a class that was held back by its own limits and is not, or not as much, any more: what it could not use is not saved up.
    fn save_nothing_up(&mut self, position: usize) {
        let flow = &mut self.flows[position];
        if !flow.waiting.is_empty() {
            flow.virtual_time = flow.virtual_time.max(self.virtual_time);
        }
    }

    fn is_full(&self) -> bool {
        self.running >= self.limit && self.strictness != Strictness::Observes
    }
}

impl Flow {
    /// Something of this cost does not wait any more.
    fn left(&mut self, cost: f64) {
        // Sums of fractions drift.
        self.waiting_cost = if self.waiting.is_empty() { 0.0 } else { (self.waiting_cost - cost).max(0.0) };
    }
}

impl ClassState {
    fn new(class: &Class) -> Self {
        Self {
            weight: f64::from(class.weight.get()),
            max_concurrent: class.max_concurrent,
            max_beside_urgent: class.max_beside_urgent.min(class.max_concurrent),
            most_now: class.max_concurrent,
            reserved: class.reserved,
            max_memory_bytes: class.max_memory_bytes,
            max_queued: class.max_queued,
            ages_after: class.ages_after,
            holds_concurrency: class.enforces(Rule::Concurrency),
            holds_memory: class.enforces(Rule::Memory),
            running: 0,
            memory_bytes: 0,
            queued: 0,
        }
    }

    /// Whether less of it may be under way beside a more urgent one.
    fn yields(&self) -> bool {
        self.max_beside_urgent < self.max_concurrent
    }

    /// Whether its own limits keep what waits of it from beginning.
    fn holds_back(&self, flow: &Flow) -> bool {
        flow.waiting.values().next().is_some_and(|head| !self.has_room(head.request.memory_bytes))
    }

    /// Whether its own limits let one more begin.
    fn has_room(&self, memory_bytes: u64) -> bool {
        match self.beyond(memory_bytes) {
            None => true,
            Some(Rule::Concurrency) => !self.holds_concurrency && (!self.holds_memory || self.has_memory(memory_bytes)),
            Some(_) => !self.holds_memory,
        }
    }

    /// Whether no more than one more of it may be under way.
    fn has_one_place(&self) -> bool {
        self.holds_concurrency && self.running + 1 >= self.most_now
    }

    /// The limit that one more is beyond, whether it is in force or not.
    fn beyond(&self, memory_bytes: u64) -> Option<Rule> {
        if self.running >= self.most_now {
            return Some(Rule::Concurrency);
        }
        (!self.has_memory(memory_bytes)).then_some(Rule::Memory)
    }

    fn has_memory(&self, memory_bytes: u64) -> bool {
        self.memory_bytes.saturating_add(memory_bytes) <= self.max_memory_bytes
    }
}

//! The members that are known, and the choice among them.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
};

use mongo_core::{
    CircuitBreaker, Error, ErrorKind, Result, RetryBudget, breaker::BreakerPermit, lock::lock, metrics::MetricsSink,
    mongodb::options::SelectionCriteria,
};
use tokio::time::Instant;

use super::{
    RouterSettings, Target,
    hedge::Hedges,
    member::{self, MemberRole, MemberState},
    read::ReadInstruments,
    read_route::{ReadRoute, Tier},
};

/// The members that are known, and who of them is next.
#[derive(Debug)]
pub(super) struct Members {
    pub(super) settings: RouterSettings,
    by_address: Mutex<BTreeMap<String, Known>>,
    /// Pays for going on to the next after an overload.
    pub(super) retries: RetryBudget,
    pub(super) hedges: Hedges,
    pub(super) instruments: ReadInstruments,
}

/// A member, and how it has served.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) state: MemberState,
    selection: SelectionCriteria,
    breaker: CircuitBreaker,
}

/// The member that was chosen, and how to tell how it served.
pub(super) struct Chosen {
    pub(super) tier: Tier,
    pub(super) target: Target,
    pub(super) permit: BreakerPermit,
}

impl Members {
    pub(super) fn new(settings: RouterSettings, metrics: &dyn MetricsSink) -> Self {
        Self {
            settings,
            by_address: Mutex::default(),
            retries: RetryBudget::default(),
            hedges: Hedges::default(),
            instruments: ReadInstruments::new(metrics),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Known>> {
        lock(&self.by_address)
    }

    /// Takes over what members have said. Who has not answered is known as before, for as long as that is believed; who does not belong to the set any more is forgotten then.
    pub(super) fn learn(&self, states: Vec<MemberState>) -> Result<()> {
        let mut members = self.lock();
        for state in states {
            match members.get_mut(&state.address) {
                // Of two rounds at once the later one may have begun earlier.
                Some(known) if known.state.seen > state.seen => {}
                Some(known) => known.state = state,
                None => {
                    let selection = member::only(&state.address)?;
                    let breaker = CircuitBreaker::new(self.settings.breaker.clone());
                    members.insert(state.address.clone(), Known { state, selection, breaker });
                }
            }
        }
        members.retain(|_, known| known.state.seen.elapsed() < self.settings.believe_for.saturating_mul(FORGOTTEN_AFTER));
        Ok(())
    }

    /// Chooses one that was not tried yet.
    pub(super) fn choose(&self, route: &ReadRoute, tried: &[String]) -> Result<Chosen> {
        route.chain.iter().find_map(|tier| self.choose_of(*tier, route, tried)).ok_or_else(|| {
            let tiers: Vec<String> = route.chain.iter().map(|tier| format!("{tier:?}").to_lowercase()).collect();
            Error::new(ErrorKind::Unavailable, "no member is fit for this read: allow others, or more lag")
                .with_context("asked for", tiers.join(", then "))
                .with_context("known", self.lock().len())
                .with_context("tried", tried.len())
        })
    }

    /// As [`choose`](Self::choose), of one tier.
    pub(super) fn choose_of(&self, tier: Tier, route: &ReadRoute, tried: &[String]) -> Option<Chosen> {
        let members = self.lock();
        let now = Instant::now();
        let leads = self.leads(&members);
        let mut fit: Vec<(&Known, u32)> = members
            .values()
            .filter(|known| !tried.contains(&known.state.address))
            .filter(|known| self.is_fit(&known.state, tier, route, now, leads.as_deref() == Some(known.state.address.as_str())))
            .map(|known| (known, self.settings.weights.get(&known.state.address).copied().unwrap_or(1)))
            .filter(|(_, weight)| *weight > 0)
            .collect();
        while let Some(position) = by_weight(&fit) {
            let (known, _) = fit.swap_remove(position);
            // Whoever has failed too often is passed over.
            if let Ok(permit) = known.breaker.acquire() {
                let MemberState { address, role, .. } = known.state.clone();
                return Some(Chosen { tier, target: Target { address, role, selection: known.selection.clone() }, permit });
            }
        }
        None
    }

    /// Of those that say that they lead the one that does. One that has not heard yet of its successor has not come as far; one that is dead was not heard lately, however far it had come.
    fn leads(&self, members: &BTreeMap<String, Known>) -> Option<String> {
        let primaries = || members.values().map(|known| &known.state).filter(|state| state.role == MemberRole::Primary);
        let heard = primaries().map(|state| state.seen).max()?;
        let lately = primaries().filter(|state| heard.saturating_duration_since(state.seen) <= self.settings.answer_within);
        lately.max_by_key(|state| state.applied).map(|state| state.address.clone())
    }

    fn is_fit(&self, state: &MemberState, tier: Tier, route: &ReadRoute, now: Instant, leads: bool) -> bool {
        let age = now.saturating_duration_since(state.seen);
        let role = match tier {
            Tier::Any => true,
            Tier::Primary => state.role == MemberRole::Primary,
            Tier::Secondaries => state.role == MemberRole::Secondary,
        };
        let is_primary = state.role == MemberRole::Primary && leads;
        role && age < self.settings.believe_for
            // It may have fallen behind by as much since it was asked.
            && (is_primary || route.max_lag.is_none_or(|most| state.lag + age <= most))
            && (is_primary || route.not_before.is_none_or(|at| state.applied >= at))
    }
}

/// The position of one of them, at random by their weights.
fn by_weight(members: &[(&Known, u32)]) -> Option<usize> {
    let total: u64 = members.iter().map(|(_, weight)| u64::from(*weight)).sum();
    let mut pick = fastrand::u64(0..total.max(1));
    members.iter().position(|(_, weight)| match pick.checked_sub(u64::from(*weight)) {
        Some(left) => {
            pick = left;
            false
        }
        None => true,
    })
}

/// So many times as long as it is believed it is kept, so that how a member has served is not forgotten by a short absence.
const FORGOTTEN_AFTER: u32 = 12;

//! A read, from one member after the other, or from two at once.

use std::{pin::pin, sync::Arc};

use mongo_core::{
    Error, ErrorKind, Result,
    metrics::{Counter, MetricsSink},
};
use tokio::time::{Instant, sleep};

use super::{
    Target,
    members::{Chosen, Members},
    read_route::{ReadRoute, Tier},
};

/// What an error says.
enum Fault {
    /// The member could not be reached, or has too much to do: another may serve.
    Member(Error),
    /// It did not answer in time. Another would not do it in less, but one that is asked already may.
    Time(Error),
    /// The read itself is wrong, and wrong everywhere.
    Read(Error),
}

impl Members {
    /// Reads from whoever is fit, each at most once.
    pub(super) async fn read<T, F, Fut>(&self, route: &ReadRoute, work: F) -> Result<T>
    where
        F: Fn(Target) -> Fut + Send + Sync,
        Fut: Future<Output = Result<T>> + Send,
        T: Send,
    {
        let result = self.read_from_anybody(route, work).await;
        self.instruments.ended(&result);
        result
    }

    async fn read_from_anybody<T, F, Fut>(&self, route: &ReadRoute, work: F) -> Result<T>
    where
        F: Fn(Target) -> Fut + Send + Sync,
        Fut: Future<Output = Result<T>> + Send,
        T: Send,
    {
        self.retries.deposit();
        if route.hedged.is_some() {
            self.hedges.earn();
        }
        let mut tried: Vec<String> = Vec::new();
        let mut last: Option<Error> = None;
        loop {
            let chosen = match (self.choose(route, &tried), last) {
                (Ok(chosen), _) => chosen,
                (Err(nobody), None) => return Err(nobody),
                (Err(_), Some(last)) => return Err(last),
            };
            if !tried.is_empty() {
                self.instruments.rerouted.add(1);
            }
            tried.push(chosen.target.address.clone());
            let asked = match &route.hedged {
                Some(shape) => self.read_hedged(route, shape, chosen, &mut tried, &work).await,
                None => read_from(chosen, &work).await,
            };
            let error = match asked {
                Ok(value) => return Ok(value),
                Err(Fault::Read(error) | Fault::Time(error)) => return Err(error),
                Err(Fault::Member(error)) => error,
            };
            // Who could not be reached has done nothing, so that the next does it for the first time. Who was overloaded has.
            if error.is_overload() && !self.retries.withdraw() {
                return Err(error.with_context("gave up because", "retry budget spent"));
            }
            last = Some(error);
        }
    }

    /// Reads from who was chosen, and from a second one as well if that takes long.
    async fn read_hedged<T, F, Fut>(
        &self,
        route: &ReadRoute,
        shape: &str,
        chosen: Chosen,
        tried: &mut Vec<String>,
        work: &F,
    ) -> Result<T, Fault>
    where
        F: Fn(Target) -> Fut + Send + Sync,
        Fut: Future<Output = Result<T>> + Send,
        T: Send,
    {
        let began = Instant::now();
        // A primary has enough to do.
        let tier = if chosen.tier == Tier::Any { Tier::Secondaries } else { chosen.tier };
        let delay = self.hedges.delay(shape);
        let mut first = pin!(read_from(chosen, work));
        let early = match delay {
            None => Some(first.as_mut().await),
            Some(delay) => tokio::select! {
                biased;
                early = &mut first => Some(early),
                () = sleep(delay) => None,
            },
        };
        let another = || self.choose_of(tier, route, tried).filter(|_| self.hedges.pay());
        let result = match early {
            Some(early) => early,
            None => match another() {
                None => first.await,
                Some(other) => {
                    tried.push(other.target.address.clone());
                    let mut second = pin!(read_from(other, work));
                    tokio::select! {
                        biased;
                        result = &mut first => {
                            let is_served = result.is_ok();
                            let result = or_else(result, second).await;
                            self.instruments.hedged(!is_served && result.is_ok());
                            result
                        }
                        result = &mut second => {
                            self.instruments.hedged(result.is_ok());
                            or_else(result, first).await
                        }
                    }
                }
            },
        };
        if result.is_ok() {
            self.hedges.took(shape, began.elapsed());
        }
        result
    }
}

/// The one result, or where it does not say enough what comes of the other read.
async fn or_else<T: Send>(result: Result<T, Fault>, other: impl Future<Output = Result<T, Fault>> + Send) -> Result<T, Fault> {
    match result {
        Ok(_) | Err(Fault::Read(_)) => result,
        Err(fault) => match (other.await, fault) {
            // Somebody could not be reached, but the time of the other is up, or the other way round: the time is up.
            (Err(Fault::Member(_)), Fault::Time(error)) => Err(Fault::Time(error)),
            // An overload is told, as going on after it has to be paid for.
            (Err(Fault::Member(_)), Fault::Member(error)) if error.is_overload() => Err(Fault::Member(error)),
            (other, _) => other,
        },
    }
}

/// Reads from one member, and learns how it has served.
async fn read_from<T, F, Fut>(chosen: Chosen, work: &F) -> Result<T, Fault>
where
    F: Fn(Target) -> Fut + Send + Sync,
    Fut: Future<Output = Result<T>> + Send,
    T: Send,
{
    let Chosen { target, permit, .. } = chosen;
    let address = target.address.clone();
    match work(target).await {
        Ok(value) => {
            permit.succeeded();
            Ok(value)
        }
        Err(error) if error.kind() == ErrorKind::Unavailable => {
            // Who has too much to do is well: if it were left alone, the others would have its work as well.
            if error.is_overload() {
                drop(permit);
            } else {
                permit.failed();
            }
            Err(Fault::Member(error.with_context("member", address)))
        }
        Err(error) if error.kind() == ErrorKind::Timeout && error.server_code().is_none() => {
            permit.failed();
            Err(Fault::Time(error.with_context("member", address)))
        }
        Err(error) => {
            // A member that says itself that the time was up has answered.
            match error.kind() {
                ErrorKind::Cancelled => drop(permit),
                _ => permit.succeeded(),
            }
            Err(Fault::Read(error))
        }
    }
}

/// The metrics of routed reads.
#[derive(Debug)]
pub(super) struct ReadInstruments {
    completed: Arc<dyn Counter>,
    failed: Arc<dyn Counter>,
    rerouted: Arc<dyn Counter>,
    hedges_won: Arc<dyn Counter>,
    hedges_lost: Arc<dyn Counter>,
}

impl ReadInstruments {
    pub(super) fn new(sink: &dyn MetricsSink) -> Self {
        let routed = |outcome| {
            sink.counter(
                "mongo_workload_routed_total",
                "Reads that were routed to a member, by how they ended.",
                &[("outcome", outcome)],
            )
        };
        let hedges = |outcome| {
            let help = "Reads that a second member was asked for, by whether it was the one that served.";
            sink.counter("mongo_workload_hedges_total", help, &[("outcome", outcome)])
        };
        Self {
            completed: routed("completed"),
            failed: routed("failed"),
            rerouted: sink.counter("mongo_workload_rerouted_total", "Reads that went on to another member.", &[]),
            hedges_won: hedges("won"),
            hedges_lost: hedges("lost"),
        }
    }

    fn hedged(&self, second_served: bool) {
        if second_served {
            self.hedges_won.add(1);
        } else {
            self.hedges_lost.add(1);
        }
    }

    fn ended<T>(&self, result: &Result<T>) {
        match result {
            Ok(_) => self.completed.add(1),
            Err(_) => self.failed.add(1),
        }
    }
}

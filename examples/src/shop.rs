//! A shop that is asked for more than it can do: what the `workload` example shows and what `bench workload` measures.

use std::{sync::Arc, time::Duration};

use mongo_core::{
    Deployment, Error, ErrorKind, Result,
    bson::{Document, doc},
    mongodb::{Collection, action::Action as _},
};
use mongo_workload::{Limits, Manager, Submission};
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep_until},
};

/// The orders of a shop.
#[derive(Clone, Debug)]
pub struct Shop {
    orders: Collection<Document>,
    documents: i64,
}

/// What somebody wants of the shop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Traffic {
    /// One order by its `_id`, for somebody at the till: class `critical`.
    Checkout,
    /// The last orders of a customer: class `high`.
    Search,
    /// A changed status: class `normal`.
    Update,
    /// Sums over some ten thousand orders: class `low`.
    Report,
}

impl Traffic {
    /// All, the most urgent first.
    pub const ALL: [Self; 4] = [Self::Checkout, Self::Search, Self::Update, Self::Report];

    /// Its class.
    pub fn class(self) -> &'static str {
        match self {
            Self::Checkout => "critical",
            Self::Search => "high",
            Self::Update => "normal",
            Self::Report => "low",
        }
    }

    /// How it is submitted to a manager.
    pub fn submission(self) -> Submission {
        match self {
            Self::Checkout => Submission::read("critical").shape("find orders by _id"),
            Self::Search => Submission::read("high").shape("find orders by customer"),
            Self::Update => Submission::write("normal").shape("update orders by _id"),
            Self::Report => Submission::read("low").shape("aggregate orders by status"),
        }
    }
}

impl Shop {
    /// A shop with so many orders in `database`, which is dropped first.
    ///
    /// # Errors
    /// The server's.
    pub async fn open(deployment: &Deployment, database: &str, documents: i64) -> Result<Self> {
        let database = deployment.database(database);
        database.drop().await?;
        let orders = database.collection::<Document>("orders");
        let all: Vec<i64> = (0..documents).collect();
        for some in all.chunks(5_000) {
            let order = |id: &i64| {
                let status = ["open", "paid", "shipped", "returned"][(id % 4) as usize];
                doc! { "_id": id, "customer": id * 7 % CUSTOMERS, "status": status, "total": (id % 1000) as f64 / 10.0, "note": "x".repeat(200) }
            };
            orders.insert_many(some.iter().map(order)).await?;
        }
        orders.create_index(mongo_core::mongodb::IndexModel::builder().keys(doc! { "customer": 1, "_id": -1 }).build()).await?;
        Ok(Self { orders, documents })
    }

    /// The same shop through another client.
    #[must_use]
    pub fn through(&self, deployment: &Deployment) -> Self {
        let name = self.orders.namespace();
        Self { orders: deployment.database(&name.db).collection(&name.coll), documents: self.documents }
    }

    /// Serves somebody, within limits if there are any.
    ///
    /// # Errors
    /// The server's.
    pub async fn serve(&self, traffic: Traffic, limits: Option<Limits>) -> Result<()> {
        let (max_time, comment) = limits.map(|limits| (limits.max_time, limits.comment)).unzip();
        let comment = comment.map(mongo_core::bson::Bson::String);
        let id = fastrand::i64(0..self.documents.max(1));
        match traffic {
            Traffic::Checkout => {
                self.orders
                    .find_one(doc! { "_id": id })
                    .optional(max_time, |find, time| find.max_time(time))
                    .optional(comment, |find, comment| find.comment(comment))
                    .await?;
            }
            Traffic::Search => {
                let find = self.orders.find(doc! { "customer": id % CUSTOMERS }).sort(doc! { "_id": -1 }).limit(20);
                let mut found = find
                    .optional(max_time, |find, time| find.max_time(time))
                    .optional(comment, |find, comment| find.comment(comment))
                    .await?;
                while found.advance().await? {}
            }
            Traffic::Update => {
                let update =
                    self.orders.update_one(doc! { "_id": id }, doc! { "$set": { "status": "paid" }, "$inc": { "changes": 1 } });
                update.optional(comment, |update, comment| update.comment(comment)).await?;
            }
            Traffic::Report => {
                let from = id % (self.documents - REPORT).max(1);
                let stages = [
                    doc! { "$match": { "_id": { "$gte": from, "$lt": from + REPORT } } },
                    doc! { "$group": { "_id": "$status", "orders": { "$sum": 1 }, "total": { "$sum": "$total" } } },
                ];
                let aggregate = self.orders.aggregate(stages);
                let mut found = aggregate
                    .optional(max_time, |aggregate, time| aggregate.max_time(time))
                    .optional(comment, |aggregate, comment| aggregate.comment(comment))
                    .await?;
                while found.advance().await? {}
            }
        }
        Ok(())
    }
}

/// Who decides what is let in to the shop, and when.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Door {
    /// Nobody.
    Open,
    /// A semaphore, in the order of arrival.
    Fifo(Arc<Semaphore>),
    /// A manager, by class.
    Managed(Manager),
}

/// How it went with a kind of traffic.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Ledger {
    /// Milliseconds from arrival to the end, of what ended well.
    pub latencies: Vec<f64>,
    /// Milliseconds of these until it began.
    pub waits: Vec<f64>,
    /// Seconds for which it was under way, all together.
    pub busy: f64,
    /// What ended well before the time was over.
    pub in_time: u64,
    /// Turned away at once.
    pub refused: u64,
    /// Its time was up.
    pub timed_out: u64,
    /// Ended with another error.
    pub failed: u64,
    /// Still waiting or under way when the time was over.
    pub unfinished: u64,
}

impl Ledger {
    /// The value below which so many percent lie; 0 of nothing.
    pub fn percentile(values: &[f64], percent: usize) -> f64 {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let place = (sorted.len() * percent).div_ceil(100);
        sorted.get(place.saturating_sub(1).min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0)
    }

    fn take(&mut self, served: Result<Served>, until: Instant) {
        match served {
            Ok(served) => {
                self.in_time += u64::from(served.ended <= until);
                self.busy += served.took.as_secs_f64();
                self.waits.push(served.waited.as_secs_f64() * 1e3);
                self.latencies.push((served.waited + served.took).as_secs_f64() * 1e3);
            }
            Err(error) if error.kind() == ErrorKind::Timeout => self.timed_out += 1,
            Err(error) if error.kind() == ErrorKind::Unavailable && error.driver().is_none() => self.refused += 1,
            Err(_) => self.failed += 1,
        }
    }

    fn add(&mut self, other: Self) {
        self.latencies.extend(other.latencies);
        self.waits.extend(other.waits);
        self.busy += other.busy;
        self.in_time += other.in_time;
        self.refused += other.refused;
        self.timed_out += other.timed_out;
        self.failed += other.failed;
        self.unfinished += other.unfinished;
    }
}

struct Served {
    waited: Duration,
    took: Duration,
    ended: Instant,
}

/// Somebody comes so often a second, at random, whatever becomes of those before: an open load. Latency counts from when they were due, so that a shop that stands still does not look fast.
pub async fn offer(shop: &Shop, door: &Door, traffic: Traffic, per_second: f64, time: Duration, seed: u64) -> Ledger {
    let mut random = fastrand::Rng::with_seed(seed);
    let (began, mut due) = (Instant::now(), Duration::ZERO);
    let mut guests: JoinSet<Result<Served>> = JoinSet::new();
    let mut ledger = Ledger::default();
    loop {
        due += Duration::from_secs_f64(-(1.0 - random.f64()).ln() / per_second);
        if due >= time {
            break;
        }
        sleep_until(began + due).await;
        let (shop, door) = (shop.clone(), door.clone());
        guests.spawn(async move { visit(&shop, &door, traffic, began + due).await });
        while let Some(Ok(served)) = guests.try_join_next() {
            ledger.take(served, began + time);
        }
    }
    let closes = began + time + Duration::from_millis(500);
    while let Ok(Some(served)) = tokio::time::timeout_at(closes, guests.join_next()).await {
        ledger.take(served.map_err(Error::from).and_then(|served| served), began + time);
    }
    ledger.unfinished = guests.len() as u64;
    guests.shutdown().await;
    ledger
}

/// So many come, and whenever one is served the next is there: a load that is never satisfied.
pub async fn press(shop: &Shop, door: &Door, traffic: Traffic, guests: usize, time: Duration) -> Ledger {
    let until = Instant::now() + time;
    let mut all: JoinSet<Ledger> = JoinSet::new();
    for _ in 0..guests {
        let (shop, door) = (shop.clone(), door.clone());
        all.spawn(async move {
            let mut ledger = Ledger::default();
            while Instant::now() < until {
                // Whoever is there when the time is over is still served: giving up what has begun would leave the driver's pool in disorder.
                let served = visit(&shop, &door, traffic, Instant::now()).await;
                let is_refused = served.is_err();
                ledger.take(served, until);
                if is_refused {
                    // Who is turned away comes again, and not at once.
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            ledger
        });
    }
    let mut ledger = Ledger::default();
    while let Some(one) = all.join_next().await {
        ledger.add(one.unwrap_or_default());
    }
    ledger
}

async fn visit(shop: &Shop, door: &Door, traffic: Traffic, due: Instant) -> Result<Served> {
    let served = async |limits| {
        let began = Instant::now();
        shop.serve(traffic, limits).await?;
        let ended = Instant::now();
        Ok(Served { waited: began.saturating_duration_since(due), took: ended - began, ended })
    };
    match door {
        Door::Open => served(None).await,
        Door::Fifo(slots) => {
            let _slot = slots.acquire().await.map_err(|error| Error::internal("closed").with_source(error))?;
            served(None).await
        }
        Door::Managed(manager) => manager.run(&traffic.submission(), |limits| served(Some(limits))).await,
    }
}

const CUSTOMERS: i64 = 1_000;
/// Orders in a report.
const REPORT: i64 = 10_000;

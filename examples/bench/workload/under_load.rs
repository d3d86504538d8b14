//! A shop under more load than it can bear, with and without a manager.

use std::{sync::Arc, time::Duration};

use mongo_core::{ConnectOptions, Error, Result, connect};
use mongo_examples::shop::{Door, Ledger, Shop, Traffic, offer, press};
use mongo_workload::{Access, Class, Classes, Manager, ManagerSettings, Submission};
use serde::Serialize;
use tokio::{
    process::Command,
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::middle;

/// A shop to be loaded.
pub(super) struct Load {
    pub(super) shop: Shop,
    pub(super) uri: String,
    /// The process of a server of its own.
    pub(super) server: Option<u32>,
    pub(super) time: Duration,
    pub(super) runs: usize,
}

/// What somebody at the till feels of five times as many reports as the server can make.
#[derive(Serialize)]
pub(super) struct Protection {
    door: &'static str,
    /// Medians of the runs, of the milliseconds until the till has its order.
    idle_p50: f64,
    idle_p99: f64,
    busy_p50: f64,
    busy_p99: f64,
    /// The median of the runs' ratios.
    busy_over_idle_p99: f64,
    /// Of those at the till, so many had nothing when the time was over.
    unserved_percent: f64,
    reports_per_second: f64,
}

impl Protection {
    pub(super) fn print(&self) {
        println!(
            "{:24} till alone p50 {:>7.2} p99 {:>7.2} ms   with 5x reports p50 {:>8.2} p99 {:>8.2} ms {:>7.2}x   unserved {:>5.1} %   {:>6.0} reports/s",
            self.door,
            self.idle_p50,
            self.idle_p99,
            self.busy_p50,
            self.busy_p99,
            self.busy_over_idle_p99,
            self.unserved_percent,
            self.reports_per_second
        );
    }
}

/// The till alone, then with reports, and the reports.
struct Shift {
    idle: Ledger,
    busy: Ledger,
    reports: Ledger,
}

/// In milliseconds; no number where nobody was served.
fn latency(ledger: &Ledger, percent: usize) -> f64 {
    if ledger.latencies.is_empty() { f64::NAN } else { Ledger::percentile(&ledger.latencies, percent) }
}

/// How near shares come to weights while every class wants more than there is.
#[derive(Serialize)]
pub(super) struct Share {
    what: &'static str,
    /// In percent of all time, the most urgent class first.
    wanted: Vec<f64>,
    got: Vec<f64>,
    /// The largest difference, in points; the median of the runs.
    error: f64,
}

impl Share {
    pub(super) fn print(&self) {
        let list = |values: &[f64]| values.iter().map(|value| format!("{value:.1}")).collect::<Vec<_>>().join(" ");
        println!("{:40} wanted {} got {} error {:.2} points", self.what, list(&self.wanted), list(&self.got), self.error);
    }
}

/// What is done in time when more and more is asked for.
#[derive(Serialize)]
pub(super) struct Goodput {
    door: &'static str,
    /// Times what the server can do.
    load: f64,
    per_second: f64,
    over_peak: f64,
}

impl Goodput {
    pub(super) fn print(&self) {
        println!(
            "{:24} {:>4.1} x load {:>8.0} in time/s {:>6.2} of its peak",
            self.door, self.load, self.per_second, self.over_peak
        );
    }
}

/// How long it takes until the slots suit a server that has become slower or faster.
#[derive(Serialize)]
pub(super) struct Step {
    what: &'static str,
    /// Slots at the end of it.
    slots: f64,
    /// Until the slots came within a fifth of that, or within one.
    seconds: f64,
    per_second: f64,
    refused: u64,
    timed_out: u64,
    failed: u64,
}

impl Step {
    pub(super) fn print(&self) {
        println!(
            "{:40} {:>5.1} slots after {:>5.2} s, {:>6.0} in time/s, {} refused, {} timed out, {} failed",
            self.what, self.slots, self.seconds, self.per_second, self.refused, self.timed_out, self.failed
        );
    }
}

fn doors() -> [(&'static str, Door); 4] {
    [
        ("no control", Door::Open),
        ("a semaphore of 32, FIFO", Door::Fifo(Arc::new(Semaphore::new(32)))),
        ("mongo-workload", Door::Managed(Manager::new(ManagerSettings::default()))),
        ("no limit beside the till", Door::Managed(Manager::new(ManagerSettings::default().with_classes(unyielding())))),
    ]
}

/// As the default, but as many reports may be under way beside the till as there are slots.
fn unyielding() -> Classes {
    let mut classes: Vec<Class> = Classes::default().iter().cloned().collect();
    classes.iter_mut().for_each(|class| class.max_beside_urgent = u32::MAX);
    Classes::new(classes).unwrap_or_default()
}

impl Load {
    /// The shop through a client that nobody has used. Whoever gives up while it waits for a connection of the driver (3.9.1) stays in its queue, and everybody behind has to wait until so many others
    /// have come: that must not be carried from one measurement to the next.
    async fn fresh(&self) -> Result<Shop> {
        Ok(self.shop.through(&connect(ConnectOptions::from_uri(&self.uri)?).await?))
    }

    /// Reports that the server makes a second.
    pub(super) async fn capacity(&self) -> f64 {
        // What was just written is still on its way to the disk.
        press(&self.shop, &Door::Open, Traffic::Report, 4, WARM_UP * 2).await;
        let ledger = press(&self.shop, &Door::Open, Traffic::Report, 4, self.time).await;
        ledger.in_time as f64 / self.time.as_secs_f64()
    }

    async fn till(&self, shop: &Shop, door: &Door, seed: u64) -> Ledger {
        offer(shop, door, Traffic::Checkout, TILL_PER_SECOND, self.time, seed).await
    }

    pub(super) async fn protection(&self, capacity: f64) -> Result<Vec<Protection>> {
        let mut runs: Vec<Vec<Shift>> = doors().iter().map(|_| Vec::new()).collect();
        for run in 0..self.runs as u64 {
            for ((_, door), shifts) in doors().iter().zip(&mut runs) {
                let shop = self.fresh().await?;
                let idle = self.till(&shop, door, run).await;
                let reports = offer(&shop, door, Traffic::Report, capacity * 5.0, self.time + WARM_UP, run);
                let (busy, reports) = tokio::join!(
                    async {
                        sleep(WARM_UP).await;
                        self.till(&shop, door, run).await
                    },
                    reports
                );
                shifts.push(Shift { idle, busy, reports });
                sleep(WARM_UP).await;
            }
        }
        let row = |((door, _), shifts): (_, Vec<Shift>)| {
            let of = |value: &dyn Fn(&Shift) -> f64| middle(shifts.iter().map(value));
            Protection {
                door,
                idle_p50: of(&|shift| latency(&shift.idle, 50)),
                idle_p99: of(&|shift| latency(&shift.idle, 99)),
                busy_p50: of(&|shift| latency(&shift.busy, 50)),
                busy_p99: of(&|shift| latency(&shift.busy, 99)),
                busy_over_idle_p99: of(&|shift| latency(&shift.busy, 99) / latency(&shift.idle, 99)),
                unserved_percent: of(&|shift| {
                    let Ledger { latencies, unfinished, refused, timed_out, failed, .. } = &shift.busy;
                    let without = (unfinished + refused + timed_out + failed) as f64;
                    without * 100.0 / (without + latencies.len() as f64)
                }),
                reports_per_second: of(&|shift| shift.reports.in_time as f64 / (self.time + WARM_UP).as_secs_f64()),
            }
        };
        Ok(doors().into_iter().zip(runs).map(row).collect())
    }

    pub(super) async fn shares(&self) -> Result<Vec<Share>> {
        // Cheap ones for the heavy classes are the harder case: one report is as long as a hundred of them.
        let alike = [Traffic::Report; 4];
        let skewed = [Traffic::Checkout, Traffic::Checkout, Traffic::Report, Traffic::Report];
        let mut rows = Vec::new();
        for (what, traffic) in [("shares, costs alike", alike), ("shares, costs of 1 to a hundred", skewed)] {
            let (mut errors, mut shares) = (Vec::new(), Vec::new());
            for _ in 0..self.runs {
                let got = self.share_of(traffic).await?;
                let error = got.iter().zip(WANTED).map(|(got, wanted)| (got - wanted).abs()).fold(0.0, f64::max);
                errors.push(error);
                shares.push(got);
            }
            let got = (0..WANTED.len()).map(|class| middle(shares.iter().map(|share| share[class]))).collect();
            rows.push(Share { what, wanted: WANTED.to_vec(), got, error: middle(errors.into_iter()) });
        }
        Ok(rows)
    }

    /// Each class asks for one kind of traffic, all the time; gives what each has got, in percent of the time that slots were held.
    async fn share_of(&self, traffic: [Traffic; 4]) -> Result<Vec<f64>> {
        let mut classes: Vec<Class> = Classes::default().iter().cloned().collect();
        // What has waited long goes before its share; here it is shares that are looked at.
        classes.iter_mut().for_each(|class| class.ages_after = Duration::from_secs(3600));
        let names: Vec<String> = classes.iter().map(|class| class.name.clone()).collect();
        let manager = Manager::new(ManagerSettings::default().with_classes(Classes::new(classes)?));
        let mut all = JoinSet::new();
        let until = Instant::now() + WARM_UP + self.time;
        let from = Instant::now() + WARM_UP;
        for (position, (name, traffic)) in names.into_iter().zip(traffic).enumerate() {
            // Reports must not wait longer than their class allows, and orders not be asked for too seldom.
            for _ in 0..if traffic == Traffic::Report { 4 } else { 16 } {
                let (manager, shop, name) = (manager.clone(), self.shop.clone(), name.clone());
                all.spawn(async move {
                    let submission = Submission::read(name).shape(traffic.class());
                    let mut held = Duration::ZERO;
                    while Instant::now() < until {
                        let served = manager.run(&submission, |limits| {
                            let shop = &shop;
                            async move {
                                let began = Instant::now().max(from);
                                shop.serve(traffic, Some(limits)).await?;
                                Ok(Instant::now().min(until).saturating_duration_since(began))
                            }
                        });
                        held += served.await.unwrap_or_default();
                    }
                    (position, held.as_secs_f64())
                });
            }
        }
        let mut held = [0.0; 4];
        while let Some(one) = all.join_next().await {
            let (position, seconds) = one?;
            held[position] += seconds;
        }
        let sum: f64 = held.iter().sum();
        Ok(held.iter().map(|seconds| seconds * 100.0 / sum).collect())
    }

    pub(super) async fn goodput(&self, capacity: f64) -> Result<Vec<Goodput>> {
        let mut rows = Vec::new();
        // Where there are only reports, the last is like the one before it.
        for (position, (door, _)) in doors().iter().enumerate().take(3) {
            let mut of_door = Vec::new();
            for load in [0.5, 0.9, 1.5, 3.0] {
                let mut rates = Vec::new();
                for run in 0..self.runs as u64 {
                    // A new one each time: what has piled up is not carried over.
                    let (_, fresh) = &doors()[position];
                    let shop = self.fresh().await?;
                    let ledger = offer(&shop, fresh, Traffic::Report, capacity * load, self.time, run).await;
                    let in_time = ledger.latencies.iter().filter(|latency| **latency < DEADLINE_MS).count();
                    rates.push(in_time as f64 / self.time.as_secs_f64());
                    sleep(Duration::from_millis(500)).await;
                }
                of_door.push((load, middle(rates.into_iter())));
            }
            let peak = of_door.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
            rows.extend(of_door.into_iter().map(|(load, per_second)| Goodput {
                door,
                load,
                per_second,
                over_peak: per_second / peak,
            }));
        }
        Ok(rows)
    }

    /// Reports all the time, while the server loses a processor and gets it back.
    pub(super) async fn steps(&self) -> Result<Vec<Step>> {
        let manager = Manager::new(ManagerSettings::default());
        let door = Door::Managed(manager.clone());
        let mut rows = Vec::new();
        let Some(server) = self.server else {
            eprintln!("steps are only made with a server of the program's own");
            return Ok(rows);
        };
        for (what, processors) in
            [("all processors", "0-1023"), ("the server has one processor", "0"), ("all of them again", "0-1023")]
        {
            let pinned = Command::new("taskset").args(["-acp", processors, &server.to_string()]).output();
            if !pinned.await.is_ok_and(|output| output.status.success()) {
                return Err(Error::invalid("cannot pin the server to a processor: install taskset, or leave --part steps out"));
            }
            let time = self.time.max(Duration::from_secs(12));
            let watch = async {
                let began = Instant::now();
                let mut seen = Vec::new();
                while began.elapsed() < time {
                    seen.push((began.elapsed().as_secs_f64(), f64::from(manager.slots(Access::Read).total)));
                    sleep(Duration::from_millis(50)).await;
                }
                seen
            };
            let (ledger, seen) = tokio::join!(press(&self.shop, &door, Traffic::Report, 100, time), watch);
            let last: Vec<f64> = seen.iter().filter(|(at, _)| *at > time.as_secs_f64() - 5.0).map(|(_, slots)| *slots).collect();
            let slots = last.iter().sum::<f64>() / last.len().max(1) as f64;
            // A trial of half as many for a moment is no change of mind: means of a second.
            let far = seen.windows(20).rfind(|some| {
                let mean = some.iter().map(|(_, slots)| slots).sum::<f64>() / some.len() as f64;
                some.last().is_some_and(|(at, _)| *at < time.as_secs_f64() - 5.0) && (mean - slots).abs() > (slots * 0.2).max(1.0)
            });
            let seconds = far.and_then(|some| some.last()).map_or(0.0, |(at, _)| *at);
            let Ledger { in_time, refused, timed_out, failed, .. } = ledger;
            rows.push(Step { what, slots, seconds, per_second: in_time as f64 / time.as_secs_f64(), refused, timed_out, failed });
        }
        Ok(rows)
    }
}

/// At the till, so often.
const TILL_PER_SECOND: f64 = 100.0;
const WARM_UP: Duration = Duration::from_secs(2);
/// Weights of 8, 4, 2 and 1 in percent.
const WANTED: [f64; 4] = [800.0 / 15.0, 400.0 / 15.0, 200.0 / 15.0, 100.0 / 15.0];
/// A report that comes later is of no use: what the class allows.
const DEADLINE_MS: f64 = 5_000.0;

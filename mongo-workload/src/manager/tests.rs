use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use mongo_core::metrics::MemoryMetrics;
use proptest::prelude::*;
use tokio::time::sleep;

use super::*;
use crate::Rate;

const MS: Duration = Duration::from_millis(1);

fn settings(slots: u32, change: impl Fn(&mut Class)) -> ManagerSettings {
    let mut classes: Vec<Class> = Classes::default().iter().cloned().collect();
    classes.iter_mut().for_each(change);
    ManagerSettings::default().with_classes(Classes::new(classes).unwrap()).with_slots(NonZeroU32::new(slots).unwrap())
}

fn manager(slots: u32) -> Manager {
    Manager::new(settings(slots, |_| {}))
}

fn counts(manager: &Manager, class: &str) -> (u32, u32) {
    let status = manager.status();
    let class = status.iter().find(|status| status.class == class).unwrap();
    (class.running, class.waiting)
}

async fn takes(time: Duration) -> Result<()> {
    sleep(time).await;
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn an_operation_gets_the_limits_of_its_class() {
    let manager = manager(1);
    let limits = manager.run(&Submission::read("high"), |limits| async { Ok(limits) }).await.unwrap();
    assert_eq!((limits.class.as_str(), limits.max_time, limits.batch_size, limits.attempt), ("high", 30_000 * MS, 500, 1));
    assert_eq!(limits.comment, "mongo-workload class=high attempt=1");
    // What it has waited is no longer its own.
    let holder = manager.acquire(&Submission::read("low")).await.unwrap();
    let submission = Submission::read("high").within(1000 * MS);
    let waiting = manager.run(&submission, |limits| async move { Ok(limits.max_time) });
    let (left, ()) = tokio::join!(waiting, async {
        sleep(400 * MS).await;
        drop(holder);
    });
    assert_eq!(left.unwrap(), 600 * MS);
    let patient = Submission::read("high").within(Duration::MAX);
    assert_eq!(manager.run(&patient, |limits| async move { Ok(limits.max_time) }).await.unwrap(), 86_400_000 * MS);
    let unknown = manager.run(&Submission::read("urgent"), |_| takes(MS)).await.unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::InvalidInput);
}

#[tokio::test(start_paused = true)]
async fn the_more_urgent_goes_first_and_reads_do_not_wait_for_writes() {
    let manager = manager(1);
    let holder = manager.acquire(&Submission::write("low")).await.unwrap();
    manager.run(&Submission::read("low"), |_| takes(MS)).await.unwrap();
    let order = Mutex::new(Vec::new());
    let one = |class: &'static str| {
        let (manager, order) = (&manager, &order);
        async move {
            let work = |_| async {
                order.lock().unwrap().push(class);
                takes(10 * MS).await
            };
            manager.run(&Submission::write(class).shape("same"), work).await.unwrap();
        }
    };
    // The low ones are there first.
    tokio::join!(one("low"), one("low"), one("critical"), one("critical"), one("critical"), async {
        sleep(MS).await;
        drop(holder);
    });
    let order = order.into_inner().unwrap();
    assert_eq!(order.iter().take(4).filter(|class| **class == "critical").count(), 3, "{order:?}");
    assert_eq!(order.len(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_is_tried_again_at_lower_classes_three_times_at_most() {
    let manager = manager(4);
    let seen = Mutex::new(Vec::new());
    let work = |limits: Limits| {
        seen.lock().unwrap().push((limits.class, limits.attempt));
        takes(3_600_000 * MS)
    };
    let error = manager.run(&Submission::read("critical"), work).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.to_string().contains("attempts: 4"), "{error}");
    let classes = ["critical", "high", "normal", "low"];
    assert_eq!(*seen.lock().unwrap(), classes.map(str::to_owned).into_iter().zip(1..).collect::<Vec<_>>());
    assert_eq!(counts(&manager, "critical"), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_write_that_has_begun_is_not_tried_again_unless_it_is_idempotent() {
    let manager = manager(1);
    let attempts = AtomicU32::new(0);
    let work = |_| {
        attempts.fetch_add(1, Relaxed);
        takes(3_600_000 * MS)
    };
    manager.run(&Submission::write("critical"), work).await.unwrap_err();
    assert_eq!(attempts.swap(0, Relaxed), 1);
    manager.run(&Submission::write("critical").idempotent(), work).await.unwrap_err();
    assert_eq!(attempts.swap(0, Relaxed), 4);
    // One that has only waited has done nothing yet.
    let holder = manager.acquire(&Submission::write("low")).await.unwrap();
    let submission = Submission::write("high").within(10 * MS);
    let waiting = manager.run(&submission, |limits| async move { Ok(limits.class) });
    let (class, ()) = tokio::join!(waiting, async {
        sleep(15 * MS).await;
        drop(holder);
    });
    assert_eq!(class.unwrap(), "normal");
}

#[tokio::test(start_paused = true)]
async fn other_failures_are_tried_again_only_as_the_settings_say() {
    let down = || Err::<(), _>(Error::new(ErrorKind::Unavailable, "down"));
    let attempts = AtomicU32::new(0);
    let work = |_| {
        attempts.fetch_add(1, Relaxed);
        async move { down() }
    };
    manager(1).run(&Submission::read("high"), work).await.unwrap_err();
    assert_eq!(attempts.swap(0, Relaxed), 1);
    let patient = Manager::new(settings(1, |_| {}).with_retry(RetryPolicy::default().with_max_attempts(3)));
    patient.run(&Submission::read("high"), work).await.unwrap_err();
    assert_eq!(attempts.swap(0, Relaxed), 3);
    patient.run(&Submission::write("high"), work).await.unwrap_err();
    assert_eq!(attempts.swap(0, Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn what_is_late_when_its_turn_comes_is_never_begun() {
    let manager = manager(1);
    let holder = manager.acquire(&Submission::read("low")).await.unwrap();
    let begun = AtomicU32::new(0);
    let submission = Submission::read("low").within(5 * MS);
    let late = manager.run(&submission, |_| {
        begun.fetch_add(1, Relaxed);
        takes(MS)
    });
    let error = late.await.unwrap_err();
    assert_eq!((error.kind(), begun.load(Relaxed)), (ErrorKind::Timeout, 0));
    assert_eq!(counts(&manager, "low"), (1, 0));
    drop(holder);
    assert_eq!(counts(&manager, "low"), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn what_would_not_be_done_in_time_is_refused_at_once() {
    let manager = manager(1);
    let submission = Submission::read("normal").shape("scan");
    manager.run(&submission, |_| takes(1000 * MS)).await.unwrap();
    let work = |_| takes(1000 * MS);
    let mut waiting: Vec<_> = (0..5).map(|_| Box::pin(manager.run(&submission, work))).collect();
    for future in &mut waiting {
        assert!(futures_poll(future.as_mut()).await.is_none());
    }
    assert_eq!(counts(&manager, "normal"), (1, 4));
    let error = manager.run(&submission.clone().within(2000 * MS), work).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("in time"), "{error}");
    for future in waiting {
        future.await.unwrap();
    }
    // However dear it is believed to be, who need not wait is let in.
    manager.run(&submission.clone().within(10 * MS), |_| takes(MS)).await.unwrap();
}

/// Polls once.
async fn futures_poll<F: Future>(mut future: std::pin::Pin<&mut F>) -> Option<F::Output> {
    std::future::poll_fn(|context| {
        std::task::Poll::Ready(match future.as_mut().poll(context) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        })
    })
    .await
}

#[tokio::test(start_paused = true)]
async fn rates_queues_and_memory_are_refused_with_what_to_do() {
    let manager = Manager::new(settings(1, |class| {
        if class.name == "normal" {
            class.rate = Some(Rate::new(1.0, 2));
        }
        (class.max_queued, class.max_memory_bytes) = (1, 1000);
    }));
    let normal = Submission::read("normal");
    for _ in 0..2 {
        manager.run(&normal, |_| async { Ok(()) }).await.unwrap();
    }
    let error = manager.run(&normal, |_| takes(MS)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("welcome again in ms: 1001"), "{error}");
    sleep(1001 * MS).await;
    manager.run(&normal, |_| async { Ok(()) }).await.unwrap();

    let low = Submission::read("low");
    let holder = manager.acquire(&low).await.unwrap();
    let mut waiting = Box::pin(manager.acquire(&low));
    assert!(futures_poll(waiting.as_mut()).await.is_none());
    let error = manager.acquire(&low).await.unwrap_err();
    assert!(error.to_string().contains("max_queued"), "{error}");
    let error = manager.acquire(&Submission::read("high").memory(1001)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    drop(holder);
    drop(waiting.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn whoever_goes_away_leaves_its_place_and_its_slot_to_the_next() {
    let manager = manager(1);
    let submission = Submission::read("normal");
    let work = |_| takes(100 * MS);
    let mut first = Box::pin(manager.run(&submission, work));
    assert!(futures_poll(first.as_mut()).await.is_none());
    let mut second = Box::pin(manager.run(&submission, work));
    assert!(futures_poll(second.as_mut()).await.is_none());
    let mut third = Box::pin(manager.run(&submission, work));
    assert!(futures_poll(third.as_mut()).await.is_none());
    assert_eq!(counts(&manager, "normal"), (1, 2));
    drop(second);
    assert_eq!(counts(&manager, "normal"), (1, 1));
    drop(first);
    assert_eq!(counts(&manager, "normal"), (1, 0));
    third.await.unwrap();
    assert_eq!(counts(&manager, "normal"), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn thousands_that_go_away_after_their_turn_has_come_lose_no_slot() {
    let manager = manager(1);
    let submission = Submission::read("normal");
    let holder = manager.acquire(&submission).await.unwrap();
    // 999 who will not look any more, and one who does.
    let mut gone: Vec<_> = (0..999).map(|_| Box::pin(manager.acquire(&submission))).collect();
    for future in &mut gone {
        assert!(futures_poll(future.as_mut()).await.is_none());
    }
    let mut stays = Box::pin(manager.acquire(&submission));
    assert!(futures_poll(stays.as_mut()).await.is_none());
    drop(holder);
    // The first of them has been given the slot, and is dropped with it; so it goes on.
    drop(gone);
    drop(stays.await.unwrap());
    assert_eq!(counts(&manager, "normal"), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn more_slots_let_more_begin_at_once_and_fewer_interrupt_nobody() {
    let manager = manager(1);
    let submission = Submission::read("normal");
    let work = |_| takes(100 * MS);
    let jobs: Vec<_> = (0..5).map(|_| manager.submit(submission.clone(), work)).collect();
    sleep(50 * MS).await;
    assert_eq!(counts(&manager, "normal"), (1, 4));
    manager.set_slots(Access::Read, NonZeroU32::new(4).unwrap());
    assert_eq!(counts(&manager, "normal"), (4, 1));
    manager.set_slots(Access::Read, NonZeroU32::MIN);
    assert_eq!(manager.slots(Access::Read), Slots { total: 1, busy: 4 });
    // Those that were under way go on to their end, and the last one waits for all of them.
    sleep(75 * MS).await;
    assert_eq!(manager.slots(Access::Read).busy, 3);
    sleep(50 * MS).await;
    assert_eq!(manager.slots(Access::Read).busy, 1);
    for job in jobs {
        job.outcome().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn who_gives_up_its_place_lets_in_what_it_stood_before() {
    let manager = Manager::new(settings(8, |class| class.max_memory_bytes = 100));
    let of = |bytes| Submission::read("normal").memory(bytes).within(60_000 * MS);
    let holder = manager.acquire(&of(60)).await.unwrap();
    let large = of(60);
    let mut large = Box::pin(manager.acquire(&large));
    assert!(futures_poll(large.as_mut()).await.is_none());
    let small = of(10);
    let mut small = Box::pin(manager.acquire(&small));
    assert!(futures_poll(small.as_mut()).await.is_none());
    drop(large);
    drop(futures_poll(small.as_mut()).await.unwrap().unwrap());
    drop(holder);
}

#[tokio::test(start_paused = true)]
async fn a_reservation_that_lapses_and_age_are_noticed_though_nothing_else_happens() {
    let manager = Manager::new(settings(4, |class| match class.name.as_str() {
        "critical" => class.reserved = 3,
        "low" => class.ages_after = 3_600_000 * MS,
        _ => {}
    }));
    manager.run(&Submission::read("critical"), |_| takes(MS)).await.unwrap();
    let low = Submission::read("low").within(60_000 * MS);
    let holder = manager.acquire(&low).await.unwrap();
    let started = Instant::now();
    drop(manager.acquire(&low).await.unwrap());
    assert!(started.elapsed() <= 2 * RESERVED_FOR, "{:?}", started.elapsed());
    drop(holder);
}

#[tokio::test(start_paused = true)]
async fn a_shape_that_was_dear_once_is_let_in_again() {
    let manager = manager(1);
    let dear = Submission::read("normal").shape("scan");
    // Far longer than its class allows.
    manager.run(&dear.clone().within(100_000 * MS), |_| takes(90_000 * MS)).await.unwrap();
    let cheap = Submission::read("normal").shape("lookup");
    let work = |_| takes(MS);
    let (first, second, third) = tokio::join!(manager.run(&cheap, work), manager.run(&cheap, work), manager.run(&dear, work));
    for done in [first, second, third] {
        done.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn timeouts_of_all_are_not_multiplied() {
    let manager = manager(100);
    let attempts = AtomicU32::new(0);
    let work = |_| {
        attempts.fetch_add(1, Relaxed);
        takes(3_600_000 * MS)
    };
    for _ in 0..100 {
        manager.run(&Submission::read("critical"), work).await.unwrap_err();
    }
    // A hundred, ten in reserve, and a fifth of what was begun: first attempts and those at lower classes put in alike.
    let attempts = attempts.load(Relaxed);
    assert!((110..=140).contains(&attempts), "{attempts}");
}

#[tokio::test(start_paused = true)]
async fn what_has_no_time_is_not_begun() {
    let begun = AtomicU32::new(0);
    let work = |_| {
        begun.fetch_add(1, Relaxed);
        takes(MS)
    };
    let error = manager(1).run(&Submission::write("low").within(Duration::ZERO), work).await.unwrap_err();
    assert_eq!((error.kind(), begun.load(Relaxed)), (ErrorKind::Timeout, 0));
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_one_job_harms_no_other() {
    let manager = manager(1);
    let submission = Submission::read("normal");
    let panicking = {
        let (manager, submission) = (manager.clone(), submission.clone());
        tokio::spawn(async move { manager.run(&submission, |_| async { panic!("on purpose") as Result<()> }).await })
    };
    assert!(panicking.await.unwrap_err().is_panic());
    assert_eq!(counts(&manager, "normal"), (0, 0));
    manager.run(&submission, |_| takes(MS)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn metrics_tell_of_each_class() {
    let metrics = MemoryMetrics::default();
    let manager = Manager::with_metrics(settings(1, |class| class.max_queued = 1), &metrics);
    let submission = Submission::read("low");
    manager.run(&submission, |_| takes(20 * MS)).await.unwrap();
    manager.run(&submission, |_| async { Err::<(), _>(Error::invalid("wrong")) }).await.unwrap_err();
    manager.run(&submission, |_| takes(10_000 * MS)).await.unwrap_err();
    let holder = manager.acquire(&submission).await.unwrap();
    let mut waits = Box::pin(manager.run(&submission, |_| takes(MS)));
    assert!(futures_poll(waits.as_mut()).await.is_none());
    manager.acquire(&submission).await.unwrap_err();
    let class = ("class", "low");
    assert_eq!(metrics.gauge_value("mongo_workload_waiting", &[class]), Some(1.0));
    assert_eq!(metrics.gauge_value("mongo_workload_running", &[class]), Some(1.0));
    drop(waits);
    drop(holder);
    assert_eq!(metrics.gauge_value("mongo_workload_waiting", &[class]), Some(0.0));
    assert_eq!(metrics.gauge_value("mongo_workload_running", &[class]), Some(0.0));
    for outcome in ["completed", "failed", "timed_out", "cancelled"] {
        let count = metrics.counter_value("mongo_workload_operations_total", &[class, ("outcome", outcome)]);
        assert_eq!(count, Some(1), "{outcome}");
    }
    assert_eq!(metrics.counter_value("mongo_workload_refused_total", &[class, ("reason", "queue")]), Some(1));
    assert_eq!(metrics.observations("mongo_workload_service_seconds", &[class]).unwrap()[0], 0.02);
    assert_eq!(metrics.observations("mongo_workload_wait_seconds", &[class]).unwrap().len(), 4);
}

#[tokio::test(start_paused = true)]
async fn slots_that_find_their_number_never_stand_still() {
    let mut classes: Vec<Class> = Classes::default().iter().cloned().collect();
    classes.iter_mut().for_each(|class| class.ages_after = Duration::from_secs(3600));
    let manager = Manager::new(ManagerSettings::default().with_classes(Classes::new(classes).unwrap()));
    let running = Arc::new(AtomicU32::new(0));
    let until = Instant::now() + Duration::from_secs(10);
    let mut all = tokio::task::JoinSet::new();
    for class in ["critical", "high", "normal", "low"] {
        for _ in 0..16 {
            let (manager, running) = (manager.clone(), Arc::clone(&running));
            all.spawn(async move {
                while Instant::now() < until {
                    let work = |_| async {
                        let busy = running.fetch_add(1, Relaxed) + 1;
                        sleep(15 * MS * busy.max(2) / 2).await;
                        running.fetch_sub(1, Relaxed);
                        Ok(())
                    };
                    let _may_be_late = manager.run(&Submission::read(class), work).await;
                }
            });
        }
    }
    while let Some(one) = all.join_next().await {
        one.unwrap();
    }
    assert!(Instant::now() < until + Duration::from_secs(5), "{:?} {:?}", Instant::now() - until, manager);
}

#[tokio::test(start_paused = true)]
async fn rules_that_only_observe_change_nothing_and_are_counted() {
    for observes in [false, true] {
        let metrics = MemoryMetrics::default();
        let settings = settings(8, |class| {
            (class.max_concurrent, class.max_queued, class.max_memory_bytes) = (1, 1, 100);
            class.rate = Some(Rate::new(0.001, 3));
            class.time_limit = 50 * MS;
            if observes {
                class.observe_only = Rule::ALL.to_vec();
            }
        });
        let manager = Manager::with_metrics(settings, &metrics);
        let read = Submission::read("high").memory(60);
        let begun = |entry: Result<Permit>| entry.is_ok();
        // Far more memory than there may ever be.
        assert_eq!(begun(manager.acquire(&read.clone().memory(1000)).await), observes);
        let first = manager.acquire(&read).await.unwrap();
        let mut second = Box::pin(manager.acquire(&read));
        let second_begins = futures_poll(second.as_mut()).await;
        assert_eq!(second_begins.is_some(), observes);
        let mut third = Box::pin(manager.acquire(&read));
        let third_ends = futures_poll(third.as_mut()).await;
        // One waits already; or else it begins, and comes too often.
        assert_eq!(begun(third_ends.unwrap()), observes);
        drop((first, second_begins));
        drop((second, third));
        let long = manager.run(&read, |_| takes(600 * MS)).await;
        assert_eq!(long.is_ok(), observes);
        let of =
            |rule: &str| metrics.counter_value("mongo_workload_observed_total", &[("class", "high"), ("rule", rule)]).unwrap();
        let counted = ["concurrency", "memory", "rate", "time_limit"].map(|rule| of(rule) > 0);
        assert_eq!(counted, [observes; 4]);
        assert_eq!(of("slots"), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn slots_that_only_observe_hold_nobody_up() {
    let metrics = MemoryMetrics::default();
    let manager = Manager::with_metrics(settings(2, |_| {}).with_observed_slots(), &metrics);
    let read = Submission::read("low");
    let mut all = Vec::new();
    for _ in 0..5 {
        all.push(manager.acquire(&read).await.unwrap());
    }
    let would = metrics.counter_value("mongo_workload_observed_total", &[("class", "low"), ("rule", "slots")]);
    assert_eq!((would, counts(&manager, "low")), (Some(3), (5, 0)));
    manager.set_slots(Access::Read, NonZeroU32::MIN);
    all.push(manager.acquire(&read).await.unwrap());
    drop(all);
    assert_eq!(counts(&manager, "low"), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn what_the_server_says_of_its_load_takes_slots_away_and_gives_them_back() {
    let dirty = Arc::new(AtomicU32::new(0));
    let told = Arc::clone(&dirty);
    let signal = move || {
        let mut load = Load::default();
        load.dirty_cache = f64::from(told.load(Relaxed)) / 100.0;
        Some(load)
    };
    let metrics = MemoryMetrics::default();
    let manager = Manager::with_metrics(settings(10, |_| {}).with_load_signal(Arc::new(signal)), &metrics);
    let look = || async {
        sleep(300 * MS).await;
        drop(manager.acquire(&Submission::read("low")).await.unwrap());
        let gauge = metrics.gauge_value("mongo_workload_slots", &[("access", "write")]);
        (manager.slots(Access::Read).total, manager.slots(Access::Write).total, gauge)
    };
    assert_eq!(look().await, (10, 10, Some(10.0)));
    dirty.store(30, Relaxed);
    assert_eq!(look().await, (3, 3, Some(3.0)));
    dirty.store(4, Relaxed);
    assert_eq!(look().await, (10, 10, Some(10.0)));
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_done_in_time_any_more_is_not_begun() {
    let manager = manager(1);
    let scan = Submission::read("low").shape("scan");
    manager.run(&scan, |_| takes(400 * MS)).await.unwrap();
    let holder = manager.acquire(&Submission::read("critical")).await.unwrap();
    let begun = AtomicU32::new(0);
    let work = |_| {
        begun.fetch_add(1, Relaxed);
        takes(400 * MS)
    };
    let waits = scan.within(1000 * MS);
    let waiting = manager.run(&waits, work);
    let (ended, ()) = tokio::join!(waiting, async {
        sleep(700 * MS).await;
        drop(holder);
    });
    assert_eq!((ended.unwrap_err().kind(), begun.load(Relaxed)), (ErrorKind::Timeout, 0), "300 ms are too little for it");
}

#[tokio::test(start_paused = true)]
async fn what_is_reserved_is_left_however_loaded_the_server_says_that_it_is() {
    let signal = || {
        let mut load = Load::default();
        load.read_tickets = crate::load::Tickets::new(1, 5);
        Some(load)
    };
    let classes = Classes::default();
    let critical = classes.iter().find(|class| class.name == "critical").unwrap().reserved;
    let manager = Manager::new(ManagerSettings::default().with_classes(classes).with_load_signal(Arc::new(signal)));
    drop(manager.acquire(&Submission::read("low")).await.unwrap());
    assert_eq!(manager.slots(Access::Read).total, 1, "nobody claims anything");
    let held = manager.acquire(&Submission::read("critical")).await.unwrap();
    assert_eq!(manager.slots(Access::Read).total, critical + 1);
    // And so the others still have one.
    let other = tokio::time::timeout(MS, manager.acquire(&Submission::read("low"))).await;
    assert!(other.is_ok_and(|other| other.is_ok()));
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn a_load_signal_that_panics_knows_nothing_and_harms_nobody() {
    let asked = Arc::new(AtomicU32::new(0));
    let counts = Arc::clone(&asked);
    let signal = move || -> Option<Load> {
        assert!(counts.fetch_add(1, Relaxed) > 1000, "on purpose");
        None
    };
    let manager = Manager::new(settings(2, |_| {}).with_load_signal(Arc::new(signal)));
    for _ in 0..10 {
        manager.run(&Submission::read("high"), |_| takes(400 * MS)).await.unwrap();
    }
    assert!(asked.load(Relaxed) >= 10);
    assert_eq!(manager.slots(Access::Read), Slots { total: 2, busy: 0 });
}

#[tokio::test(start_paused = true)]
async fn how_long_it_takes_to_fail_is_not_taken_for_how_long_it_takes() {
    let manager = manager(1);
    let scan = Submission::read("low").shape("scan");
    manager.run(&scan, |_| takes(1000 * MS)).await.unwrap();
    for _ in 0..50 {
        let failed = manager.run(&scan, |_| async { Err::<(), _>(Error::new(ErrorKind::Rejected, "no such index")) }).await;
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::Rejected);
    }
    // If it were taken for cheap, this would be let in to wait in vain.
    let holder = manager.acquire(&scan).await.unwrap();
    let mut waiting = Box::pin(manager.run(&scan, |_| takes(1000 * MS)));
    assert!(futures_poll(waiting.as_mut()).await.is_none());
    let refused = manager.run(&scan.clone().within(1500 * MS), |_| takes(1000 * MS)).await.unwrap_err();
    assert!(refused.to_string().contains("in time"), "{refused}");
    drop(holder);
    waiting.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn who_goes_away_when_its_turn_comes_does_not_make_such_work_look_cheap() {
    let manager = manager(1);
    let scan = Submission::read("critical").shape("scan");
    manager.run(&scan, |_| takes(1000 * MS)).await.unwrap();
    let holder = manager.acquire(&scan).await.unwrap();
    let mut waiting: Vec<_> = (0..30).map(|_| Box::pin(manager.acquire(&scan))).collect();
    for future in &mut waiting {
        assert!(futures_poll(future.as_mut()).await.is_none());
    }
    // The slot goes from one to the next, and none takes it.
    drop(holder);
    drop(waiting);
    let holder = manager.acquire(&scan).await.unwrap();
    let mut waits = Box::pin(manager.run(&scan, |_| takes(1000 * MS)));
    assert!(futures_poll(waits.as_mut()).await.is_none());
    let refused = manager.run(&scan.clone().within(1500 * MS), |_| takes(1000 * MS)).await.unwrap_err();
    assert!(refused.to_string().contains("in time"), "{refused}");
    drop(holder);
    waits.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn who_waits_begins_when_the_load_has_gone_though_nothing_ends_or_comes() {
    let dirty = Arc::new(AtomicU32::new(90));
    let told = Arc::clone(&dirty);
    let signal = move || {
        let mut load = Load::default();
        load.dirty_cache = f64::from(told.load(Relaxed)) / 100.0;
        Some(load)
    };
    let manager = Manager::new(settings(10, |_| {}).with_load_signal(Arc::new(signal)));
    let submission = Submission::read("high");
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(manager.acquire(&submission).await.unwrap());
    }
    let began = Instant::now();
    let waiting = tokio::spawn({
        let (manager, submission) = (manager.clone(), submission.clone());
        async move { manager.acquire(&submission).await.map(drop) }
    });
    sleep(MS).await;
    assert!(!waiting.is_finished());
    dirty.store(0, Relaxed);
    waiting.await.unwrap().unwrap();
    assert!(began.elapsed() <= RESERVED_FOR + 100 * MS, "{:?}", began.elapsed());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Under arrivals at random, of costs of 1 to 100, some of which are given up: no work begins when its time is up, each is done once at most, and nothing is left over.
    #[test]
    fn no_expired_work_is_executed(slots in 1_u32..6, seed: u64) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let mut random = fastrand::Rng::with_seed(seed);
            let manager = manager(slots);
            let begun = Arc::new(Mutex::new(HashMap::<u32, u32>::new()));
            let mut all = tokio::task::JoinSet::new();
            for number in 0..300 {
                sleep(MS * random.u32(0..20)).await;
                let class = ["critical", "high", "normal", "low"][random.usize(0..4)];
                let (within, cost) = (MS * random.u32(1..400), MS * random.u32(1..=100));
                let submission = if random.bool() { Submission::read(class) } else { Submission::write(class) };
                let submission = submission.shape(if cost < 20 * MS { "cheap" } else { "dear" }).within(within);
                let given_up = MS * random.u32(1..1000);
                let (manager, begun) = (manager.clone(), Arc::clone(&begun));
                all.spawn(async move {
                    let due = Instant::now() + within;
                    let work = |limits: Limits| {
                        assert!(limits.attempt > 1 || Instant::now() < due, "it began when its time was up");
                        assert!(limits.max_time >= MS && limits.max_time <= Duration::from_secs(60));
                        *begun.lock().unwrap().entry(number).or_default() += 1;
                        takes(cost.min(limits.max_time))
                    };
                    let _given_up = tokio::time::timeout(given_up, manager.run(&submission, work)).await;
                });
            }
            while let Some(done) = all.join_next().await {
                done.unwrap();
            }
            assert!(begun.lock().unwrap().len() > 20);
            assert!(manager.status().iter().all(|class| (class.running, class.waiting) == (0, 0)));
            assert!(Access::ALL.iter().all(|access| manager.slots(*access).busy == 0));
        });
    }
}

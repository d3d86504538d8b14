//! The workload manager before a real server.

use std::{
    collections::HashSet,
    num::NonZeroU32,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::future::join_all;
use mongo_backup::{Backup, Key, MemoryArchive, Repository, Restore, SnapshotChoice};
use mongo_core::{
    CancellationToken, ErrorKind,
    bson::{Document, doc},
    gate::{Gate, Verdict},
    mongodb::options::{AggregateOptions, FindOptions},
};
use mongo_testkit::TestDeployment;
use mongo_workload::{Access, Class, Classes, JobStatus, Manager, ManagerSettings, ReadRoute, ReadRouter, Submission};

use crate::{
    routing::patient,
    support::{endless, fill, gone, open, own, replicated, shared, under_way},
};

fn is_quiet(manager: &Manager) -> bool {
    let idle = [Access::Read, Access::Write].into_iter().all(|access| manager.slots(access).busy == 0);
    idle && manager.status().iter().all(|class| (class.running, class.waiting) == (0, 0))
}

#[tokio::test(flavor = "multi_thread")]
async fn of_ten_thousand_that_wait_each_is_done_once() {
    let (deployment, database) = shared("queued").await;
    fill(&deployment, &database, "c", 100).await;
    let collection = deployment.database(&database).collection::<Document>("c");
    let mut low = Class::new("low");
    low.max_queued = 20_000;
    low.time_limit = Duration::from_secs(300);
    let settings = ManagerSettings::default().with_classes(Classes::new(vec![low]).unwrap());
    let manager = Manager::new(settings);
    let done = Mutex::new(HashSet::new());
    let one = |number: i32| {
        let (manager, collection, done) = (&manager, &collection, &done);
        async move {
            let submission = Submission::read("low").shape("find one");
            manager
                .run(&submission, |limits| async move {
                    let found = collection.find_one(doc! { "_id": number % 100 }).max_time(limits.max_time).await?;
                    assert!(found.is_some() && done.lock().unwrap().insert(number), "{number} was done twice");
                    Ok(())
                })
                .await
        }
    };
    let ended = join_all((0..10_000).map(one)).await;
    assert!(ended.iter().all(Result::is_ok), "{:?}", ended.iter().find(|ended| ended.is_err()));
    assert_eq!(done.lock().unwrap().len(), 10_000);
    assert!(is_quiet(&manager), "{manager:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_in_one_job_harms_no_other() {
    let (deployment, database) = shared("panics").await;
    fill(&deployment, &database, "c", 10).await;
    let collection = deployment.database(&database).collection::<Document>("c");
    let manager = Manager::new(ManagerSettings::default().with_slots(NonZeroU32::new(2).unwrap()));
    let jobs: Vec<_> = (0..60)
        .map(|number| {
            let collection = collection.clone();
            manager.submit(Submission::read("high"), move |limits| {
                let collection = collection.clone();
                async move {
                    let count = collection.count_documents(doc! {}).max_time(limits.max_time).await?;
                    assert!(number % 3 != 0, "on purpose");
                    Ok(count)
                }
            })
        })
        .collect();
    for (number, ended) in join_all(jobs.into_iter().map(mongo_workload::Job::outcome)).await.into_iter().enumerate() {
        match ended {
            Ok(count) => assert!(number % 3 != 0 && count == 10),
            Err(error) => assert!(number % 3 == 0 && error.kind() == ErrorKind::Internal, "{number}: {error}"),
        }
    }
    assert!(is_quiet(&manager), "{manager:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ready_made_operations_keep_to_the_limits_of_their_class() {
    let (deployment, database) = shared("ready").await;
    fill(&deployment, &database, "c", 500).await;
    let database = deployment.database(&database);
    let collection = database.collection::<Document>("c");
    let manager = Manager::new(ManagerSettings::default());
    let options = FindOptions::builder().sort(doc! { "_id": -1 }).limit(30).build();
    // A batch of class low holds ten: the others come with further replies.
    let job = manager.find(Submission::read("low"), &collection, doc! { "_id": { "$lt": 400 } }, options);
    let found = job.outcome().await.unwrap();
    assert_eq!(found.iter().map(|one| one.get_i32("_id").unwrap()).collect::<Vec<_>>(), (370..400).rev().collect::<Vec<_>>());
    let pipeline = vec![doc! { "$group": { "_id": null, "count": { "$sum": 1 } } }];
    let job = manager.aggregate(Submission::read("normal"), &collection, pipeline, AggregateOptions::default());
    assert_eq!(job.outcome().await.unwrap()[0].get_i32("count").unwrap(), 500);
    let job = manager.command(Submission::read("high"), &database, doc! { "count": "c" }, None);
    assert_eq!(job.outcome().await.unwrap().get_i32("n").unwrap(), 500);
    let wrong = manager.command(Submission::read("high"), &database, doc! { "noSuchCommand": 1 }, None);
    assert_eq!(wrong.outcome().await.unwrap_err().kind(), ErrorKind::Unsupported);
    // Longer than its time: the server itself ends it, and it is tried again at no lower class, as there is none.
    let submission = Submission::read("low").within(Duration::from_millis(300));
    let late = manager.aggregate(submission, &collection, endless("c"), AggregateOptions::default()).outcome().await.err();
    assert_eq!(late.map(|error| error.kind()), Some(ErrorKind::Timeout));
    assert!(is_quiet(&manager), "{manager:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_cancelled_ends_on_the_server_too() {
    let (server, deployment) = own().await;
    fill(&deployment, "shop", "c", 500).await;
    let collection = deployment.database("shop").collection::<Document>("c");
    let manager = Manager::new(ManagerSettings::default());
    let admin = server.client().await.unwrap();
    for cancels in [true, false] {
        let job = manager.aggregate(Submission::read("critical"), &collection, endless("c"), AggregateOptions::default());
        let comment = doc! { "command.comment": { "$regex": "^mongo-workload class=critical" } };
        let never = tokio::spawn(std::future::pending::<()>());
        under_way(&admin, comment.clone(), &never).await;
        never.abort();
        assert_eq!(job.status(), JobStatus::Running);
        if cancels {
            job.cancel();
            assert_eq!(job.outcome().await.unwrap_err().kind(), ErrorKind::Cancelled);
        } else {
            drop(job);
        }
        assert!(gone(&admin, &comment).await, "it is still at work");
        assert!(is_quiet(&manager), "{manager:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_cancelled_ends_also_on_the_secondary_that_has_it() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let deployment = open(&server).await;
    fill(&deployment, "shop", "c", 500).await;
    replicated(&deployment, 3).await;
    let secondary = (server.primary().await.unwrap() + 1) % 3;
    let other = server.member((secondary + 1) % 3).host_port();
    let router = ReadRouter::open(&deployment, patient().with_weight(other, 0));
    let target = router.await.unwrap().choose(&ReadRoute::secondary()).unwrap();
    assert_eq!(target.address, server.member(secondary).host_port());
    let collection = deployment.database("shop").collection::<Document>("c");
    let manager = Manager::new(ManagerSettings::default());
    let options = AggregateOptions::builder().selection_criteria(target.selection).build();
    let job = manager.aggregate(Submission::read("critical"), &collection, endless("c"), options);
    let member = server.member(secondary).client().await.unwrap();
    let comment = doc! { "command.comment": { "$regex": "^mongo-workload class=critical" } };
    let never = tokio::spawn(std::future::pending::<()>());
    under_way(&member, comment.clone(), &never).await;
    never.abort();
    job.cancel();
    assert_eq!(job.outcome().await.unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(gone(&member, &comment).await, "it is still at work");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_hangs_and_comes_back_leaves_no_slot_taken() {
    let server = TestDeployment::replica_set(1).start().await.unwrap();
    let deployment = open(&server).await;
    fill(&deployment, "shop", "c", 10).await;
    let collection = deployment.database("shop").collection::<Document>("c");
    let mut short = Class::new("short");
    short.time_limit = Duration::from_secs(3);
    let manager = Manager::new(ManagerSettings::default().with_classes(Classes::new(vec![short]).unwrap()));
    let reads = |count: usize| {
        let jobs = (0..count).map(|_| manager.find(Submission::read("short"), &collection, doc! {}, FindOptions::default()));
        join_all(jobs.map(mongo_workload::Job::outcome))
    };
    assert!(reads(20).await.iter().all(Result::is_ok));
    server.member(0).pause().unwrap();
    let hung = reads(40).await;
    assert!(hung.iter().all(|ended| matches!(ended.as_ref().unwrap_err().kind(), ErrorKind::Timeout | ErrorKind::Unavailable)));
    assert!(is_quiet(&manager), "{manager:?}");
    server.member(0).resume().unwrap();
    // What was given up is still in the driver's way for a moment.
    let back = async { while reads(5).await.iter().any(Result::is_err) {} };
    tokio::time::timeout(Duration::from_secs(60), back).await.expect("it does not come back");
    assert!(reads(20).await.iter().all(Result::is_ok));
    assert!(is_quiet(&manager), "{manager:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_outlive_an_election_and_none_is_done_twice() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let deployment = open(&server).await;
    let collection = deployment.database("shop").collection::<Document>("c");
    collection.insert_one(doc! { "_id": "total", "count": 0 }).await.unwrap();
    let manager = Manager::new(ManagerSettings::default());
    let stop = CancellationToken::new();
    let (sure, doubtful) = (AtomicU64::new(0), AtomicU64::new(0));
    let writer = async || {
        while !stop.is_cancelled() {
            let work = |_| async {
                collection.update_one(doc! { "_id": "total" }, doc! { "$inc": { "count": 1 } }).await?;
                Ok(())
            };
            match manager.run(&Submission::write("high"), work).await {
                Ok(()) => sure.fetch_add(1, Relaxed),
                Err(_) => doubtful.fetch_add(1, Relaxed),
            };
        }
    };
    tokio::join!(writer(), writer(), writer(), writer(), async {
        let reached = async |count: u64| {
            while sure.load(Relaxed) < count {
                tokio::task::yield_now().await;
            }
        };
        reached(50).await;
        server.step_down().await.unwrap();
        reached(sure.load(Relaxed) + 50).await;
        stop.cancel();
    });
    let found = collection.find_one(doc! { "_id": "total" }).await.unwrap().unwrap();
    let (count, sure) = (u64::try_from(found.get_i32("count").unwrap()).unwrap(), sure.load(Relaxed));
    assert!((sure..=sure + doubtful.load(Relaxed)).contains(&count), "{count} counted of {sure} and {doubtful:?} in doubt");
    assert!(is_quiet(&manager), "{manager:?}");
}

/// Counts who asks, and holds once.
#[derive(Debug, Default)]
struct Counting(Mutex<Vec<String>>);

impl Gate for Counting {
    fn check(&self, work: &str) -> Verdict {
        let mut asked = self.0.lock().unwrap();
        asked.push(work.to_owned());
        if asked.len() == 1 { Verdict::Hold(Duration::from_millis(5)) } else { Verdict::Proceed }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_and_a_restore_ask_at_the_gate_before_each_batch() {
    let (deployment, database) = shared("gated").await;
    fill(&deployment, &database, "c", 20_000).await;
    let repository = Repository::open_or_init(MemoryArchive::new(), Key::unencrypted()).await.unwrap();
    let gate = Arc::new(Counting::default());
    let backup =
        Backup::builder(&deployment, &repository).namespaces(&database).gate(Arc::<Counting>::clone(&gate)).build().unwrap();
    assert_eq!(backup.run().await.unwrap().documents, 20_000);
    let asked = std::mem::take(&mut *gate.0.lock().unwrap());
    assert!(asked.len() >= 3 && asked.iter().all(|work| work == "backup"), "{asked:?}");
    let restore = Restore::builder(&repository, SnapshotChoice::Latest)
        .into(&deployment)
        .rename(&format!("{database}.*"), &format!("{database}_copy.*"))
        .gate(Arc::<Counting>::clone(&gate))
        .build()
        .unwrap();
    assert!(restore.run().await.unwrap().is_complete());
    let asked = std::mem::take(&mut *gate.0.lock().unwrap());
    assert!(asked.len() >= 3 && asked.iter().all(|work| work == "restore"), "{asked:?}");
}

/// Never opens.
#[derive(Debug)]
struct Shut(CancellationToken);

impl Gate for Shut {
    fn check(&self, _: &str) -> Verdict {
        // Somebody stands before it now.
        self.0.cancel();
        Verdict::Hold(Duration::from_secs(3600))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_held_can_be_cancelled() {
    let (deployment, database) = shared("shut").await;
    fill(&deployment, &database, "c", 1_000).await;
    let repository = Repository::open_or_init(MemoryArchive::new(), Key::unencrypted()).await.unwrap();
    let cancel = CancellationToken::new();
    let backup = Backup::builder(&deployment, &repository)
        .namespaces(&database)
        .gate(Arc::new(Shut(cancel.clone())))
        .cancellation(cancel)
        .build()
        .unwrap();
    assert_eq!(backup.run().await.unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(repository.snapshots().await.unwrap().snapshots.is_empty());
}

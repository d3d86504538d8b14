//! B7: what a restore does with names and with what is there.

use mongo_backup::{
    Backup, BackupReport, Key, LiveDiff, MemoryArchive, Repository, Restore, RestoreAction, RestoreBuilder, RestoreMode,
    SnapshotChoice, UsersAndRoles,
};
use mongo_core::{
    Deployment, ErrorKind, NamespaceSelection,
    bson::{Document, doc},
};

use crate::support::{db_hash, fill, own, shared};

struct Case {
    deployment: Deployment,
    database: String,
    repository: Repository,
    report: BackupReport,
}

impl Case {
    async fn new(prefix: &str) -> Self {
        let (deployment, database) = shared(prefix).await;
        fill(&deployment, &database, "c", 100).await;
        Self::of(deployment, database).await
    }

    async fn of(deployment: Deployment, database: String) -> Self {
        let repository = Repository::open_or_init(MemoryArchive::new(), Key::unencrypted()).await.unwrap();
        let report = Backup::builder(&deployment, &repository).namespaces(&database).build().unwrap().run().await.unwrap();
        Self { deployment, database, repository, report }
    }

    fn restore(&self) -> RestoreBuilder {
        Restore::builder(&self.repository, &self.report.id).into(&self.deployment)
    }

    /// Changes three documents, deletes three, adds one.
    async fn damage(&self) {
        let c = self.deployment.database(&self.database).collection::<Document>("c");
        c.update_many(doc! { "_id": { "$lt": 3 } }, doc! { "$set": { "text": "changed", "extra": 1 } }).await.unwrap();
        c.delete_many(doc! { "_id": { "$gte": 97 } }).await.unwrap();
        c.insert_one(doc! { "_id": 1000 }).await.unwrap();
    }

    async fn find(&self, filter: Document) -> u64 {
        self.deployment.database(&self.database).collection::<Document>("c").count_documents(filter).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_existing_collection_is_a_conflict_by_default_and_nothing_changes() {
    let case = Case::new("exists").await;
    case.damage().await;
    let before = db_hash(&case.deployment, &case.database).await;
    let error = case.restore().build().unwrap().run().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(error.to_string().contains(&format!("{}.c", case.database)) && error.to_string().contains("drop"), "{error}");
    assert_eq!(db_hash(&case.deployment, &case.database).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn insert_adds_what_is_missing_and_reports_what_exists() {
    let case = Case::new("insert").await;
    case.damage().await;
    let report = case.restore().mode(RestoreMode::Insert).build().unwrap().run().await.unwrap();
    assert_eq!((report.documents, report.refused), (3, 97));
    assert_eq!(report.refused_documents[0].reason, "a document of this _id exists");
    assert_eq!((case.find(doc! {}).await, case.find(doc! { "text": "changed" }).await), (101, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn upsert_adds_and_replaces_and_leaves_the_rest() {
    let case = Case::new("upsert").await;
    let before = db_hash(&case.deployment, &case.database).await;
    case.damage().await;
    let report = case.restore().mode(RestoreMode::Upsert).build().unwrap().run().await.unwrap();
    assert!(report.is_complete() && report.documents == 100, "{report:?}");
    assert_eq!((case.find(doc! {}).await, case.find(doc! { "extra": 1 }).await), (101, 0));
    case.deployment.database(&case.database).collection::<Document>("c").delete_one(doc! { "_id": 1000 }).await.unwrap();
    assert_eq!(db_hash(&case.deployment, &case.database).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn upsert_obeys_the_targets_validator_and_replace_overrules_it() {
    let case = Case::new("validator").await;
    case.damage().await;
    let strict = doc! { "collMod": "c", "validator": { "group": { "$lt": 10 } } };
    case.deployment.database(&case.database).run_command(strict).await.unwrap();
    let expected = (0..100).filter(|number| number % 17 >= 10).count() as u64;
    let report = case.restore().mode(RestoreMode::Upsert).build().unwrap().run().await.unwrap();
    // The server lets an update that changes nothing pass; those that it had to write were three deleted ones and three changed ones.
    assert!(report.refused > 0 && report.refused <= expected, "{report:?}");
    assert_eq!(report.refused_documents[0].code, 121);
    assert_eq!(report.documents + report.refused, 100);
    let report = case.restore().mode(RestoreMode::Replace).build().unwrap().run().await.unwrap();
    assert!(report.is_complete(), "{report:?}");
    assert_eq!(case.find(doc! { "_id": { "$lt": 100 } }).await, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_that_a_unique_index_refuses_are_counted_and_listed_up_to_the_limit() {
    let case = Case::new("unique").await;
    let c = case.deployment.database(&case.database).collection::<Document>("c");
    c.drop().await.unwrap();
    case.deployment
        .database(&case.database)
        .run_command(doc! { "createIndexes": "c", "indexes": [{ "key": { "group": 1 }, "name": "one_a_group", "unique": true }] })
        .await
        .unwrap();
    let mut settings = mongo_backup::RestoreSettings::default();
    settings.mode = RestoreMode::Insert;
    settings.list_refused = 5;
    let report = case.restore().settings(settings).build().unwrap().run().await.unwrap();
    assert_eq!((report.documents, report.refused, report.refused_documents.len()), (17, 83, 5));
    assert!(report.refused_documents[0].reason.contains("group"), "{:?}", report.refused_documents[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_makes_each_collection_anew_and_touches_no_other() {
    let case = Case::new("drop").await;
    let before = db_hash(&case.deployment, &case.database).await;
    case.damage().await;
    fill(&case.deployment, &case.database, "other", 5).await;
    let restore = case.restore().drop_existing().build().unwrap();
    let plan = restore.plan().await.unwrap();
    assert_eq!(plan.summary().namespaces[0].action, RestoreAction::DropAndCreate);
    assert!(plan.execute().await.unwrap().is_complete());
    let mut after = db_hash(&case.deployment, &case.database).await;
    assert!(after.remove("other").is_some(), "a collection that the snapshot does not have is left alone");
    assert_eq!(after, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_writes_nothing() {
    let case = Case::new("plan").await;
    case.damage().await;
    let before = db_hash(&case.deployment, &case.database).await;
    let restore = case.restore().drop_existing().build().unwrap();
    let plan = restore.plan().await.unwrap();
    assert_eq!(plan.total().0, 100);
    drop(plan);
    assert_eq!(db_hash(&case.deployment, &case.database).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn renames_and_selection_restore_beside_the_original_and_views_follow() {
    let (deployment, database) = shared("rename").await;
    for collection in ["orders", "users"] {
        fill(&deployment, &database, collection, 20).await;
    }
    deployment
        .database(&database)
        .create_collection("big")
        .view_on("orders")
        .pipeline(vec![doc! { "$match": { "group": 3 } }])
        .await
        .unwrap();
    let case = Case::of(deployment, database).await;
    let copy = format!("{}_copy", case.database);
    let report = case
        .restore()
        .exclude("*.users")
        .rename(&format!("{}.orders", case.database), &format!("{copy}.renamed"))
        .rename(&format!("{}.*", case.database), &format!("{copy}.*"))
        .build()
        .unwrap()
        .run()
        .await
        .unwrap();
    assert_eq!(report.namespaces, 2);
    let target = case.deployment.database(&copy);
    let mut names = target.list_collection_names().await.unwrap();
    names.sort();
    assert_eq!(names, ["big", "renamed", "system.views"]);
    assert_eq!(target.collection::<Document>("big").count_documents(doc! {}).await.unwrap(), 1);

    let error =
        case.restore().rename("*.orders", "*.same").rename("*.users", "*.same").build().unwrap().plan().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_cannot_be_built_is_reported_and_the_others_are_built() {
    let (deployment, database) = shared("index").await;
    fill(&deployment, &database, "c", 50).await;
    let indexes = vec![doc! { "key": { "text": 1 }, "name": "good" }, doc! { "key": { "group": 1, "_id": 1 }, "name": "taken" }];
    deployment.database(&database).run_command(doc! { "createIndexes": "c", "indexes": indexes }).await.unwrap();
    let case = Case::of(deployment, database).await;
    let database = case.deployment.database(&case.database);
    database.run_command(doc! { "dropIndexes": "c", "index": "*" }).await.unwrap();
    database.run_command(doc! { "createIndexes": "c", "indexes": [{ "key": { "x": 1 }, "name": "taken" }] }).await.unwrap();
    let report = case.restore().mode(RestoreMode::Upsert).build().unwrap().run().await.unwrap();
    assert_eq!((report.indexes, report.failures.len()), (1, 1), "{report:?}");
    assert_eq!(report.failures[0].index.as_deref(), Some("taken"));
    assert!(!report.is_complete());
}

#[tokio::test(flavor = "multi_thread")]
async fn users_and_roles_are_kept_and_come_back_when_they_are_asked_for() {
    let (_server, deployment) = own().await;
    fill(&deployment, "shop", "c", 10).await;
    let admin = deployment.database("admin");
    let role = doc! { "createRole": "clerk", "privileges": [{ "resource": { "db": "shop", "collection": "c" }, "actions": ["find"] }], "roles": [] };
    admin.run_command(role).await.unwrap();
    let shop = deployment.database("shop");
    for name in ["anna", "bert"] {
        shop.run_command(
            doc! { "createUser": name, "pwd": format!("secret of {name}"), "roles": [{ "role": "clerk", "db": "admin" }] },
        )
        .await
        .unwrap();
    }
    let everything = doc! { "usersInfo": { "forAllDBs": true }, "showCredentials": true };
    let before = admin.run_command(everything.clone()).await.unwrap();

    let repository = Repository::open_or_init(MemoryArchive::new(), Key::host([1; 32])).await.unwrap();
    let report = Backup::builder(&deployment, &repository).build().unwrap().run().await.unwrap();
    shop.run_command(doc! { "dropAllUsersFromDatabase": 1 }).await.unwrap();
    admin.run_command(doc! { "dropRole": "clerk" }).await.unwrap();

    let restore = || Restore::builder(&repository, &report.id).into(&deployment).drop_existing();
    let without = restore().build().unwrap().run().await.unwrap();
    assert_eq!(without.users_and_roles, UsersAndRoles::LeftOut);
    let users = admin.run_command(doc! { "usersInfo": { "forAllDBs": true } }).await.unwrap();
    assert!(users.get_array("users").unwrap().is_empty(), "nobody comes back who was not asked for");

    let with = restore().users_and_roles().build().unwrap().run().await.unwrap();
    assert_eq!(with.users_and_roles, UsersAndRoles::Merged);
    let after = admin.run_command(everything).await.unwrap();
    assert_eq!(after.get_array("users").unwrap(), before.get_array("users").unwrap());
    let roles = admin.run_command(doc! { "rolesInfo": "clerk", "showPrivileges": true }).await.unwrap();
    assert_eq!(roles.get_array("roles").unwrap().len(), 1);
    let left: Vec<String> = admin.list_collection_names().await.unwrap();
    assert!(!left.iter().any(|name| name.starts_with("mongo_backup")), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn mirroring_makes_the_target_what_the_snapshot_is_and_a_live_comparison_proves_it() {
    let (deployment, database) = shared("mirror").await;
    fill(&deployment, &database, "c", 5000).await;
    let db = deployment.database(&database);
    // Under a collation the order of `_id`s is not that of their values.
    db.run_command(doc! { "create": "collated", "collation": { "locale": "fr", "strength": 3 } }).await.unwrap();
    let words = db.collection::<Document>("collated");
    words.insert_many(["b", "A", "a", "É", "e", "Z"].map(|word| doc! { "_id": word })).await.unwrap();
    let repository = Repository::open_or_init(MemoryArchive::new(), Key::host([1; 32])).await.unwrap();
    let pattern = format!("{database}.*");
    let report = Backup::builder(&deployment, &repository).namespaces(&pattern).build().unwrap().run().await.unwrap();
    let before = db_hash(&deployment, &database).await;
    let compare =
        || async { LiveDiff::new(&repository, &report.id, &deployment).selection(selection(&pattern)).run().await.unwrap() };
    let same = compare().await;
    assert!(same.is_empty() && same.alike == 5006, "{same:?}");

    let collection = db.collection::<Document>("c");
    collection.update_many(doc! { "_id": { "$lt": 10 } }, doc! { "$set": { "changed": 1 } }).await.unwrap();
    collection.delete_many(doc! { "_id": { "$gte": 4990 } }).await.unwrap();
    collection.insert_many((0..7).map(|number| doc! { "_id": format!("new {number}") })).await.unwrap();
    words.insert_one(doc! { "_id": "new" }).await.unwrap();
    words.delete_one(doc! { "_id": "É" }).await.unwrap();
    let different = compare().await;
    let counts = |name: &str| {
        let found = different.namespaces.iter().find(|found| found.namespace.collection() == name).unwrap();
        (found.added, found.removed, found.changed, found.definition_changed)
    };
    assert_eq!((counts("c"), counts("collated")), ((7, 10, 10, false), (1, 1, 0, false)));

    let restore = || Restore::builder(&repository, &report.id).into(&deployment).mode(RestoreMode::Mirror);
    let refused = restore().filter(std::sync::Arc::new(|_| true)).build().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    let mirrored = restore().build().unwrap().run().await.unwrap();
    assert_eq!((mirrored.deleted, mirrored.refused), (8, 0));
    assert!(compare().await.is_empty());
    assert_eq!(db_hash(&deployment, &database).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn mirroring_frees_the_places_in_unique_indexes_before_it_fills_them() {
    let (deployment, database) = shared("mirror_unique").await;
    let db = deployment.database(&database);
    let collection = db.collection::<Document>("people");
    collection.insert_many([doc! { "_id": 1, "mail": "x" }, doc! { "_id": 2, "mail": "y" }]).await.unwrap();
    db.run_command(doc! { "createIndexes": "people", "indexes": [{ "key": { "mail": 1 }, "name": "mail", "unique": true }] })
        .await
        .unwrap();
    let repository = Repository::open_or_init(MemoryArchive::new(), Key::host([1; 32])).await.unwrap();
    Backup::builder(&deployment, &repository).namespaces(&format!("{database}.*")).build().unwrap().run().await.unwrap();
    let before = db_hash(&deployment, &database).await;
    collection.delete_one(doc! { "_id": 1 }).await.unwrap();
    collection.insert_one(doc! { "_id": 3, "mail": "x" }).await.unwrap();
    let restore =
        Restore::builder(&repository, SnapshotChoice::Latest).into(&deployment).mode(RestoreMode::Mirror).build().unwrap();
    let plan = restore.plan().await.unwrap();
    assert_eq!(plan.summary().namespaces[0].action, RestoreAction::Mirror, "a dry run says that documents will go");
    let report = plan.execute().await.unwrap();
    assert_eq!((report.deleted, report.refused), (1, 0));
    assert_eq!(db_hash(&deployment, &database).await, before);
}

fn selection(pattern: &str) -> NamespaceSelection {
    NamespaceSelection::all().including(pattern).unwrap()
}

//! Random writes from a seed, of every kind that ends up in an oplog.

use mongo_core::{
    Deployment,
    bson::{Bson, Decimal128, Document, Timestamp, doc},
    mongodb::{ClientSession, Collection, Database, error::Result},
};

/// Writes to a database at random, but always alike for the same seed.
pub(crate) struct Workload {
    random: fastrand::Rng,
    database: Database,
    collections: Vec<String>,
    ids: i32,
    /// Whether a transaction may fail: then it is aborted.
    may_fail: bool,
}

impl Workload {
    pub(crate) fn new(deployment: &Deployment, database: &str, seed: u64) -> Self {
        let collections = ["orders", "customers", "odd.names"].map(str::to_owned).to_vec();
        Self {
            random: fastrand::Rng::with_seed(seed),
            database: deployment.database(database),
            collections,
            ids: 60,
            may_fail: false,
        }
    }

    /// For servers that fail meanwhile.
    pub(crate) fn that_may_fail(self) -> Self {
        Self { may_fail: true, ..self }
    }

    /// Makes the collections.
    pub(crate) async fn begin(&self) {
        for collection in &self.collections {
            self.database.create_collection(collection).await.unwrap();
        }
    }

    pub(crate) fn collections(&self) -> &[String] {
        &self.collections
    }

    pub(crate) async fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            if self.random.u8(..) < 10 {
                self.transaction().await;
            } else {
                self.step().await;
            }
        }
    }

    async fn transaction(&mut self) {
        let done = self.try_transaction().await;
        if !self.may_fail {
            done.unwrap();
        }
    }

    /// A session that is dropped within a transaction aborts it.
    async fn try_transaction(&mut self) -> Result<()> {
        let mut session = self.database.client().start_session().await?;
        session.start_transaction().await?;
        for _ in 0..self.random.usize(1..6) {
            self.step_in(&mut session).await?;
        }
        if self.random.u8(..) < 200 { session.commit_transaction().await } else { session.abort_transaction().await }
    }

    fn id(&mut self) -> Bson {
        let number = self.random.i32(0..self.ids);
        match number % 6 {
            0 => Bson::Int64(i64::from(number)),
            1 => Bson::String(format!("id {number}")),
            2 => Bson::Document(doc! { "a": number, "b": [number] }),
            3 => Bson::Double(f64::from(number)),
            _ => Bson::Int32(number),
        }
    }

    fn value(&mut self, depth: u32) -> Bson {
        match self.random.u8(0..if depth < 3 { 12 } else { 8 }) {
            0 => Bson::Int32(self.random.i32(..)),
            1 => Bson::Double(self.random.f64()),
            2 => Bson::String("x".repeat(self.random.usize(0..40))),
            3 => Bson::Null,
            4 => Bson::Boolean(self.random.bool()),
            5 => Bson::Decimal128("1.50".parse::<Decimal128>().unwrap()),
            6 => Bson::Timestamp(Timestamp { time: 0, increment: 0 }),
            7 => Bson::Int64(self.random.i64(..)),
            8 | 9 => Bson::Array((0..self.random.usize(0..6)).map(|_| self.value(depth + 1)).collect()),
            _ => Bson::Document(self.fields(depth + 1)),
        }
    }

    fn fields(&mut self, depth: u32) -> Document {
        (0..self.random.usize(0..5)).map(|_| (self.name(), self.value(depth))).collect()
    }

    fn name(&mut self) -> String {
        ["a", "b", "c", "list", "inner", "0", "7"][self.random.usize(..7)].to_owned()
    }

    fn path(&mut self) -> String {
        let parts: Vec<String> = (0..self.random.usize(1..4)).map(|_| self.name()).collect();
        parts.join(".")
    }

    fn modification(&mut self) -> Document {
        match self.random.u8(0..10) {
            0 | 1 => doc! { "$set": { self.path(): self.value(0) } },
            2 => doc! { "$unset": { self.path(): "" } },
            3 => doc! { "$push": { "list": self.value(1) } },
            4 => doc! { "$pop": { "list": 1 } },
            5 => doc! { "$inc": { "count": 1 } },
            6 => doc! { "$push": { "list": { "$each": [self.value(2), 1, "two"], "$slice": -4 } } },
            7 => doc! { "$rename": { "a": "c" } },
            8 => doc! { "$set": { "inner": self.fields(1), "b": self.value(1) } },
            _ => doc! { "$set": { format!("list.{}", self.random.u8(0..6)): self.value(1) } },
        }
    }

    fn target(&mut self) -> (Collection<Document>, Document, Document) {
        let name = self.collections[self.random.usize(..self.collections.len())].clone();
        let id = self.id();
        let mut document = doc! { "_id": id.clone() };
        document.extend(self.fields(0));
        (self.database.collection(&name), doc! { "_id": { "$eq": id } }, document)
    }

    /// One write in a transaction, of a kind that is never refused.
    async fn step_in(&mut self, session: &mut ClientSession) -> Result<()> {
        let (collection, filter, document) = self.target();
        match self.random.u8(0..10) {
            0..5 => {
                collection.replace_one(filter, document).upsert(true).session(session).await?;
            }
            5 | 6 => {
                collection.delete_one(filter).session(session).await?;
            }
            _ => {
                let set = doc! { "$set": { "count": self.random.i32(0..99), "c": self.value(0) } };
                collection.update_one(filter, set).session(session).await?;
            }
        }
        Ok(())
    }

    /// One write. What the server refuses (a path through a number) is no matter.
    async fn step(&mut self) {
        let (collection, filter, document) = self.target();
        match self.random.u8(0..10) {
            0..3 => drop(collection.replace_one(filter, document).upsert(true).await),
            3 => drop(collection.insert_one(document).await),
            4 => drop(collection.delete_one(filter).await),
            5 => drop(collection.update_many(doc! { "count": { "$gt": self.random.i32(0..9) } }, self.modification()).await),
            _ => drop(collection.update_one(filter, self.modification()).upsert(self.random.bool()).await),
        }
    }
}

//! The documents that are measured with.

use mongo_core::bson::{RawDocumentBuf, rawdoc};

/// Makes orders as a shop keeps them: repeated field names and structure, values from small and large sets (status, address,
/// phrases), and a share of pure randomness (tokens, prices). What real data compress to lies around this: judge by the row of gzip.
pub(crate) struct Orders {
    random: fastrand::Rng,
    addresses: Vec<RawDocumentBuf>,
    phrases: Vec<String>,
    number: i64,
}

impl Orders {
    pub(crate) fn new() -> Self {
        let mut random = fastrand::Rng::with_seed(11);
        let words: Vec<String> =
            (0..2_000).map(|_| (0..random.usize(1..4)).map(|_| random.choice(SYLLABLES).unwrap_or("a")).collect()).collect();
        let mut word = |among: usize| words[random.usize(..among)].clone();
        let phrases = (0..500).map(|_| (0..14).map(|_| word(2_000)).collect::<Vec<_>>().join(" ")).collect();
        let addresses = (0..20_000)
            .map(|number| {
                rawdoc! {
                    "name": format!("{} {}", word(2_000), word(2_000)),
                    "street": format!("{number} {} Street", word(500)),
                    "city": word(200),
                    "postcode": format!("{:05}", number * 7 % 99_999),
                    "country": COUNTRIES[number % COUNTRIES.len()],
                }
            })
            .collect();
        Self { random, addresses, phrases, number: 0 }
    }

    pub(crate) fn next(&mut self) -> RawDocumentBuf {
        let Self { random, addresses, phrases, number } = self;
        *number += 1;
        let mut customer = [0; 12];
        random.fill(&mut customer);
        let placed = 1_600_000_000_000 + *number * 731 + random.i64(..1_000_000);
        let item = |random: &mut fastrand::Rng| {
            rawdoc! {
                "sku": format!("sku-{:06}", random.u32(..5_000)),
                "image": format!("https://cdn.example.com/images/products/{:016x}.jpg", random.u64(..)),
                "quantity": random.i32(1..9),
                "unitPrice": f64::from(random.u32(..10_000)) / 100.0,
            }
        };
        rawdoc! {
            "_id": *number,
            "customerId": mongo_core::bson::oid::ObjectId::from_bytes(customer),
            "status": STATES[random.usize(..STATES.len())],
            "placedAt": mongo_core::bson::DateTime::from_millis(placed),
            "updatedAt": mongo_core::bson::DateTime::from_millis(placed + random.i64(..100_000_000)),
            "shippingAddress": addresses[random.usize(..addresses.len())].clone(),
            "items": [item(random), item(random)],
            "total": f64::from(random.u32(..1_000_000)) / 100.0,
            "payment": { "provider": PROVIDERS[random.usize(..PROVIDERS.len())], "token": hexadecimal(random, 5) },
            "session": hexadecimal(random, 2),
            "note": phrases[random.usize(..phrases.len())].clone(),
        }
    }
}

/// Sixteen random digits, some times over.
fn hexadecimal(random: &mut fastrand::Rng, times: usize) -> String {
    (0..times).map(|_| format!("{:016x}", random.u64(..))).collect()
}

const SYLLABLES: [&str; 20] =
    ["an", "be", "co", "der", "el", "fi", "gor", "ha", "in", "ju", "ka", "lo", "mi", "nor", "os", "pe", "qui", "ra", "sto", "ty"];
const STATES: [&str; 4] = ["open", "paid", "shipped", "returned"];
const COUNTRIES: [&str; 5] = ["DE", "FR", "GB", "NL", "US"];
const PROVIDERS: [&str; 3] = ["visa", "mastercard", "sepa"];

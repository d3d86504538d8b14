//! Rules of the proxy, as an operator may write them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mongo_proxy::Rules;

fuzz_target!(|text: &str| {
    let Ok(rules) = Rules::from_json(text) else { return };
    let written = serde_json::to_string(&rules).expect("rules are written");
    assert_eq!(Rules::from_json(&written).expect("what was written is read"), rules);
});

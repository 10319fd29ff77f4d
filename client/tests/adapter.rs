//! `kinoflock adapter`: cards that are signed, passed on, replaced and refused.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;

use kinoflock_client::store::Store;
use kinoflock_protocol::card::{Card, ConsentGiven, Subject};
use kinoflock_protocol::{BlobId, CardId};

use crate::home::{Home, network, text};

#[path = "support/home.rs"]
mod home;

/// A small LoRA's file.
fn lora(name: &str) -> Vec<u8> {
    let header =
        format!("{{\"{name}.lora_A.weight\":{{\"dtype\":\"F32\",\"shape\":[1,1],\"data_offsets\":[0,4]}}}}");
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat()
}

fn must(home: &Home, arguments: &[&str]) -> String {
    let output = home.kinoflock(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn wrong(home: &Home, arguments: &[&str], said: &str) {
    let output = home.kinoflock(arguments);
    assert!(!output.status.success() && text(&output.stderr).contains(said), "{}", text(&output.stderr));
}

#[test]
fn an_adapter_has_a_signed_card_that_can_be_replaced_and_passed_on() {
    let (home, bytes) = (Home::new(), lora("x"));
    fs::write(home.path().join("fog.safetensors"), &bytes).unwrap();
    let id = BlobId::of(&bytes);
    let add = ["adapter", "add", "fog.safetensors", "--author", "Ada", "--author", "Ben", "--consent", "all"];
    assert_eq!(must(&home, &add).trim(), id.to_string());
    let store = Store::open(home.path().join("client")).unwrap();
    let first = store.find_adapter("fog").unwrap().card.unwrap();
    let open = |id: &CardId| store.card(id).unwrap().unwrap().open::<Card>(&network()).unwrap();
    let card = open(&first).value;
    assert_eq!((card.subject, card.version), (Subject::Adapter(id), 1));
    assert_eq!(card.shares.iter().map(|share| share.bps).collect::<Vec<_>>(), [5000, 5000]);
    assert_eq!(card.consent.given, ConsentGiven::All);
    assert!(!card.training_data.disclosed, "nothing was said of what it was trained on");

    must(
        &home,
        &["adapter", "add", "fog.safetensors", "--author", "Ada", "--trained-on", "fog", "--licence", "MIT"],
    );
    let second = store.find_adapter(&id.short()).unwrap().card.unwrap();
    let card = open(&second).value;
    assert_eq!((card.version, card.previous), (2, Some(first)));
    let shown = must(&home, &["adapter", "show", "fog"]);
    for part in [&id.to_string(), "Ada 100 %", "MIT", "fog; whether anybody agreed is not told"] {
        assert!(shown.contains(part), "{shown}");
    }
    assert!(must(&home, &["adapter", "list"]).contains("adapter fog by Ada, MIT"));

    must(&home, &["adapter", "card", "fog", "-o", "fog.card.json"]);
    let other = Home::new();
    for file in ["fog.safetensors", "fog.card.json"] {
        fs::copy(home.path().join(file), other.path().join(file)).unwrap();
    }
    must(&other, &["adapter", "add", "fog.safetensors", "--card", "fog.card.json", "--name", "mist"]);
    let theirs: serde_json::Value =
        serde_json::from_str(&must(&other, &["adapter", "show", "mist", "--json"])).unwrap();
    assert_eq!(theirs["card"], second.to_string());
    assert_eq!(theirs["signed_by"], open(&second).signer.to_string());
    must(&other, &["adapter", "remove", "mist"]);
    assert!(must(&other, &["adapter", "list"]).is_empty());
}

#[test]
fn what_is_no_adapter_and_no_card_of_it_is_refused_with_the_reason() {
    let home = Home::new();
    let write = |name: &str, bytes: &[u8]| fs::write(home.path().join(name), bytes).unwrap();
    write("fog.safetensors", &lora("x"));
    write("rain.safetensors", &lora("y"));
    write(
        "model.safetensors",
        &lora("x.lora_A.weight").iter().map(|b| if *b == b'l' { b'm' } else { *b }).collect::<Vec<_>>(),
    );
    write("cut.safetensors", &lora("x")[..12]);
    write("text.json", b"{}");
    must(&home, &["adapter", "add", "fog.safetensors", "--author", "Ada"]);
    must(&home, &["adapter", "card", "fog", "-o", "card.json"]);
    let add = |file: &'static str, more: &[&'static str]| [&["adapter", "add", file][..], more].concat();
    wrong(&home, &add("rain.safetensors", &["--card", "card.json"]), "the weights are");
    wrong(&home, &add("fog.safetensors", &["--card", "text.json"]), "no card of this adapter");
    wrong(&home, &add("model.safetensors", &[]), "holds no LoRA");
    wrong(&home, &add("cut.safetensors", &[]), "no safetensors file");
    wrong(&home, &add("nowhere.safetensors", &[]), "nowhere.safetensors");
    wrong(&home, &add("fog.safetensors", &["--licence", "MIT"]), "--author NAME is missing");
    let short = ["--author", "Ada", "--credit", "Ada=60"];
    wrong(&home, &add("fog.safetensors", &short), "credit shares make 6000 basis points instead of 10000");
    wrong(&home, &add("fog.safetensors", &["--author", "Ada", "--credit", "Ada=60.123"]), "2 digits");
    wrong(&home, &["adapter", "show", "blob1zzzz"], "adapter list");
    wrong(&home, &["generate", "x", "--lora", "fog@loud"], "its weight is");
    // A card that was changed is none.
    let card = fs::read_to_string(home.path().join("card.json")).unwrap();
    let mut card: serde_json::Value = serde_json::from_str(&card).unwrap();
    card["signer"] = kinoflock_protocol::Keypair::from_seed(&[9; 32]).public().to_string().into();
    write("changed.json", card.to_string().as_bytes());
    wrong(&home, &add("fog.safetensors", &["--card", "changed.json"]), "no card of this adapter");
}

//! The configuration as text: what `--print-config` shows and what `init` writes.

use toml::{Table, Value};

use super::docs::{DOCS, SECTIONS, text_of};
use super::file::{DeviceSection, FileConfig};
use super::{Config, Folders};

/// The effective configuration, all layers merged, as a file that loads to the same.
#[must_use]
pub fn render(config: &Config) -> String {
    let mut merged = config.merged.clone();
    let shown = |path: &std::path::Path| path.to_string_lossy().into_owned();
    merged.storage.state = shown(&config.storage.state);
    merged.storage.models = shown(&config.storage.models);
    merged.storage.runtime = shown(&config.storage.runtime);
    toml::to_string(&merged).expect("invariant: the file form serialises")
}

/// A new configuration file: every key explained, with the value it has in `chosen`. Values that are defaults are
/// commented out, so that a later release may better them.
#[must_use]
pub fn template(chosen: &FileConfig, folders: Option<&Folders>) -> String {
    let table = |file: &FileConfig| Table::try_from(file).expect("invariant: the file form serialises");
    let (values, defaults) = (table(chosen), table(&FileConfig::default()));
    let mut out = String::from(
        "# Kinoflock node. Lines that begin with '#' show defaults; take the '#' away to change one.\n\
         # Every key can be set as KINOFLOCKD_SECTION_KEY too, and by: kinoflockd --set section.key=value\n",
    );
    for section in SECTIONS {
        out.push('\n');
        comment(&mut out, section.text);
        if section.key == "device" {
            devices(&mut out, &chosen.device);
            continue;
        }
        out.push_str(&format!("[{}]\n", section.key));
        for (leaf, doc) in keys_of(section.key) {
            comment(&mut out, doc);
            let find = |table: &Table| table.get(section.key).and_then(|section| section.get(leaf)).cloned();
            let (value, default) = (find(&values), find(&defaults));
            let mark = if value == default { "#" } else { "" };
            let folder = folders
                .filter(|_| mark == "#")
                .and_then(|folders| default_folder(section.key, leaf, folders));
            let shown = folder.map(Value::String).or(value).unwrap_or(Value::String(String::new()));
            out.push_str(&format!("{mark}{leaf} = {shown}\n"));
        }
    }
    out
}

fn devices(out: &mut String, chosen: &[DeviceSection]) {
    let default = Table::try_from(DeviceSection::default()).expect("invariant: the file form serialises");
    let commented = [DeviceSection::default()];
    let (sections, header) =
        if chosen.is_empty() { (&commented[..], "#[[device]]") } else { (chosen, "[[device]]") };
    for (index, section) in sections.iter().enumerate() {
        let values = Table::try_from(section).expect("invariant: the file form serialises");
        out.push_str(&format!("{header}\n"));
        for (leaf, doc) in keys_of("device") {
            if index == 0 {
                comment(out, doc);
            }
            let mark = if values.get(leaf) == default.get(leaf) { "#" } else { "" };
            let shown = values.get(leaf).cloned().unwrap_or(Value::String(String::new()));
            out.push_str(&format!("{mark}{leaf} = {shown}\n"));
        }
    }
}

fn keys_of(section: &str) -> impl Iterator<Item = (&'static str, &'static str)> {
    let of_section =
        move |key: &'static str| key.strip_prefix(section).and_then(|rest| rest.strip_prefix('.'));
    DOCS.iter().filter_map(move |doc| Some((of_section(doc.key)?, text_of(doc.key)?)))
}

fn default_folder(section: &str, leaf: &str, folders: &Folders) -> Option<String> {
    let path = match (section, leaf) {
        ("storage", "state") => &folders.state,
        ("storage", "models") => &folders.models,
        ("storage", "runtime") => &folders.runtime,
        _ => return None,
    };
    Some(path.to_string_lossy().into_owned())
}

fn comment(out: &mut String, text: &str) {
    for line in text.lines() {
        out.push_str(&format!("# {line}\n"));
    }
}

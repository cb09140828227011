//! Changes the contents of JSON, never its syntax: values, names and their positions.
//!
//! Random changes of bytes rarely produce JSON, and the first line of the reader rejects everything
//! else.

use serde_json::{Map, Value, json};

/// A random number generator that a seed makes repeatable (SplitMix64).
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Returns a number below `limit`, which must not be 0.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.roll() % limit as u64) as usize
    }
}

/// Changes a sequence of JSON values. Returns `None` if the text is not JSON.
pub fn json(text: &[u8], dice: &mut Dice) -> Option<Vec<u8>> {
    let parsed: Result<Vec<Value>, _> = serde_json::Deserializer::from_slice(text)
        .into_iter()
        .collect();
    let mut values = parsed.ok().filter(|values| !values.is_empty())?;
    for _ in 0..=dice.below(4) {
        change(&mut values, dice);
    }
    let lines: Vec<String> = values.iter().map(Value::to_string).collect();
    Some(lines.join("\n").into_bytes())
}

/// Changes the JSON in the body of a request.
pub fn body(request: &[u8], dice: &mut Dice) -> Option<Vec<u8>> {
    let head = request.windows(2).position(|two| two == b"\n\n")? + 2;
    let changed = json(&request[head..], dice)?;
    Some([&request[..head], &changed].concat())
}

fn change(values: &mut Vec<Value>, dice: &mut Dice) {
    let line = dice.below(values.len());
    match dice.below(13) {
        0 if values.len() > 1 => drop(values.remove(line)),
        1 if values.len() < 32 => values.insert(dice.below(values.len() + 1), values[line].clone()),
        2 => {
            let other = dice.below(values.len());
            values.swap(line, other);
        }
        3..=5 => set(values, line, dice, |_, dice| odd_value(dice)),
        6 => {
            let from = dice.below(values.len());
            let pointers = pointers(&values[from]);
            let copied = values[from]
                .pointer(&pointers[dice.below(pointers.len())])
                .cloned()
                .unwrap_or_default();
            set(values, line, dice, |_, _| copied);
        }
        7 | 8 => set(values, line, dice, nudge),
        9 => copy_value(&mut values[line], dice),
        10 => remove_field(values, line, dice),
        _ => remove(&mut values[line], dice),
    }
}

/// Returns the JSON pointers of a value and of everything inside it, the value itself first.
fn pointers(value: &Value) -> Vec<String> {
    fn collect(value: &Value, at: &str, found: &mut Vec<String>) {
        found.push(at.to_owned());
        match value {
            Value::Object(fields) => {
                for (name, field) in fields {
                    collect(
                        field,
                        &format!("{at}/{}", name.replace('~', "~0").replace('/', "~1")),
                        found,
                    );
                }
            }
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    collect(item, &format!("{at}/{index}"), found);
                }
            }
            _ => {}
        }
    }

    let mut found = Vec::new();
    collect(value, "", &mut found);
    found
}

fn set(
    values: &mut [Value],
    line: usize,
    dice: &mut Dice,
    new: impl FnOnce(&Value, &mut Dice) -> Value,
) {
    let pointers = pointers(&values[line]);
    let pointer = &pointers[dice.below(pointers.len())];
    if let Some(value) = values[line].pointer_mut(pointer) {
        *value = new(value, dice);
    }
}

/// Copies a value to a name that occurs elsewhere.
fn copy_value(value: &mut Value, dice: &mut Dice) {
    let pointers = pointers(value);
    let mut any = || pointers[dice.below(pointers.len())].clone();
    let (from, named, to) = (any(), any(), any());
    let name = named.rsplit('/').next().unwrap_or_default().to_owned();
    let copied = value.pointer(&from).cloned().unwrap_or_default();
    match value.pointer_mut(&to) {
        Some(Value::Object(fields)) => drop(fields.insert(name, copied)),
        Some(Value::Array(items)) if items.len() < 64 => items.push(copied),
        _ => {}
    }
}

fn remove(value: &mut Value, dice: &mut Dice) {
    let pointers = pointers(value);
    let Some((parent, name)) = pointers[dice.below(pointers.len())].rsplit_once('/') else {
        return;
    };
    match value.pointer_mut(parent) {
        Some(Value::Object(fields)) => drop(fields.shift_remove(name)),
        Some(Value::Array(items)) => drop(items.pop()),
        _ => {}
    }
}

/// Removes a field wherever it occurs, because irrelevant fields only lengthen an input.
fn remove_field(values: &mut [Value], line: usize, dice: &mut Dice) {
    fn without(value: &mut Value, name: &str) {
        match value {
            Value::Object(fields) => {
                fields.shift_remove(name);
                fields.values_mut().for_each(|field| without(field, name));
            }
            Value::Array(items) => items.iter_mut().for_each(|item| without(item, name)),
            _ => {}
        }
    }

    let pointers = pointers(&values[line]);
    let name = pointers[dice.below(pointers.len())]
        .rsplit('/')
        .next()
        .unwrap_or_default();
    values.iter_mut().for_each(|value| without(value, name));
}

/// Returns a slightly different value of the same type.
fn nudge(value: &Value, dice: &mut Dice) -> Value {
    const STEPS: [i64; 8] = [-3600, -61, -2, -1, 1, 2, 60, 3600];

    match value {
        Value::Bool(truth) => (!truth).into(),
        Value::Number(number) => match number.as_i64() {
            Some(number) => number.wrapping_add(STEPS[dice.below(STEPS.len())]).into(),
            None => json!(-number.as_f64().unwrap_or_default()),
        },
        Value::String(text) => {
            const PUT: [&str; 8] = ["0", "a", ".", " ", "\n", "\u{0}", "é", "@"];
            let mut characters: Vec<char> = text.chars().collect();
            let at = dice.below(characters.len() + 1);
            if dice.below(2) == 0 && at < characters.len() {
                characters.remove(at);
            } else {
                characters.splice(at..at, PUT[dice.below(PUT.len())].chars());
            }
            characters.into_iter().collect::<String>().into()
        }
        Value::Array(items) => items.iter().rev().cloned().collect::<Vec<_>>().into(),
        Value::Object(fields) => fields
            .clone()
            .into_iter()
            .rev()
            .collect::<Map<_, _>>()
            .into(),
        Value::Null => false.into(),
    }
}

/// Returns a value that a programmer may have overlooked.
fn odd_value(dice: &mut Dice) -> Value {
    let odd_value = [
        Value::Null,
        true.into(),
        false.into(),
        json!([]),
        json!({}),
        json!({"id": "in_1"}),
        0.into(),
        (-1).into(),
        i64::MIN.into(),
        i64::MAX.into(),
        u64::MAX.into(),
        json!(-0.0),
        json!(2500.0),
        json!(0.5),
        json!(1e300),
        json!(9.1e18),
        253_402_207_200_i64.into(),
        253_402_207_201_i64.into(),
        "".into(),
        "in_1".into(),
        "fetched".into(),
        "invoice.paid".into(),
        "v2.core.event".into(),
        "a\u{0}b".into(),
        "é\u{202e}\u{1f600}".into(),
        "x".repeat(300).into(),
        "4242 4242\n4242  4242".into(),
        "a@b.example".into(),
        "https://pay.example/x".into(),
        "2026-01-31T09:15:00.123456789+01:00".into(),
        "9999-12-31T23:59:59Z".into(),
        "0000-01-01T00:00:00Z".into(),
    ];

    odd_value[dice.below(odd_value.len())].clone()
}

//! The picture for the README: durable acknowledgements per second of the program and of the plain
//! implementation.

use std::fmt::Write;

/// One group of bars: connections, acknowledgements per second of the plain implementation and of
/// ours.
pub type Group = (usize, f64, f64);

const WIDTH: f64 = 760.0;
const ROW: f64 = 22.0;
const LEFT: f64 = 150.0;
const RIGHT: f64 = 90.0;

/// Draws bars that are readable on light and dark pages.
pub fn svg(engines: &[(String, Vec<Group>)]) -> String {
    let fastest = engines
        .iter()
        .flat_map(|(_, groups)| groups)
        .map(|(_, plain, ours)| plain.max(*ours))
        .fold(1.0, f64::max);
    let mut bars = String::new();
    let mut y = 40.0;

    for (engine, groups) in engines {
        text(&mut bars, 12.0, y, "title", engine);
        y += ROW;
        for (connections, plain, ours) in groups {
            let name = if *connections == 1 {
                "1 connection".to_owned()
            } else {
                format!("{connections} connections")
            };
            for (label, way, acks) in [(name.as_str(), "ours", *ours), ("", "plain", *plain)] {
                text(&mut bars, 12.0, y, "label", label);
                let width = (WIDTH - LEFT - RIGHT) * acks / fastest;
                let top = y - 13.0;
                writeln!(bars, r#"<rect class="{way}" x="{LEFT}" y="{top}" width="{width:.1}" height="16" rx="2"/>"#)
                    .expect("a string takes it");
                text(
                    &mut bars,
                    LEFT + width + 6.0,
                    y,
                    "label",
                    &format!("{acks:.0}/s"),
                );
                y += ROW;
            }
            y += 6.0;
        }
        y += ROW;
    }

    format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img" aria-label="Durable acknowledgements a second, stripe-reconciler beside one commit per request">
<style>
text {{ font: 13px system-ui, sans-serif; fill: #57606a }}
.title {{ font-weight: 600 }}
.ours {{ fill: #2f81f7 }}
.plain {{ fill: #9aa4af }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #adbac7 }} }}
</style>
<text x="12" y="16">durable acknowledgements a second: <tspan class="ours">stripe-reconciler</tspan>, and one commit per request (grey)</text>
{bars}</svg>
"#
    )
}

fn text(bars: &mut String, x: f64, y: f64, class: &str, words: &str) {
    writeln!(
        bars,
        r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{words}</text>"#
    )
    .expect("a string takes it");
}

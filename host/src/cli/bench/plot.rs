//! Latency over the length of prompts and throughput over the number of clients, as SVG.

use std::{collections::BTreeMap, ops::Range, path::Path};

use anyhow::{Context as _, anyhow};
use plotters::prelude::*;

use super::Row;

const SIZE: (u32, u32) = (720, 440);
/// Room above and below what is drawn on a logarithmic axis.
const MARGIN: f64 = 1.25;

/// One line of a plot: its name and its points in rising order.
type Line = (String, Vec<(f64, f64)>);

/// One plot.
struct Plot {
    title: &'static str,
    x: &'static str,
    y: &'static str,
    lines: Vec<Line>,
}

/// Writes those of `latency-over-tokens.svg` and `throughput-over-clients.svg` for which `rows` have
/// at least two sizes, and returns their names.
pub(super) fn draw(directory: &Path, rows: &[Row]) -> anyhow::Result<Vec<&'static str>> {
    let mut written = Vec::new();
    for (name, plot) in [
        ("latency-over-tokens.svg", latency_over_tokens(rows)),
        ("throughput-over-clients.svg", throughput_over_clients(rows)),
    ] {
        if plot.lines.is_empty() {
            continue;
        }
        let mut svg = String::new();
        // The library's errors borrow the canvas, so that they cannot be passed on.
        chart(&mut svg, &plot).map_err(|problem| anyhow!(problem))?;
        let path = directory.join(name);
        std::fs::write(&path, svg)
            .with_context(|| format!("{} cannot be written", path.display()))?;
        written.push(name);
    }
    Ok(written)
}

fn latency_over_tokens(rows: &[Row]) -> Plot {
    let points = rows.iter().filter(|row| row.rounds > 0).filter_map(|row| {
        let place = (row.tokens? as f64, row.p50_us / 1e3);
        Some((series(rows, row, row.clients, "clients"), place))
    });
    Plot {
        title: "Latency of a round over the length of its prompt",
        x: "tokens",
        y: "median, ms",
        lines: lines(points),
    }
}

fn throughput_over_clients(rows: &[Row]) -> Plot {
    let points = rows.iter().filter(|row| row.rounds > 0).map(|row| {
        let place = (row.clients as f64, row.rounds_per_second);
        (series(rows, row, row.tokens.unwrap_or(0), "tokens"), place)
    });
    Plot {
        title: "Rounds per second over the number of clients",
        x: "clients",
        y: "rounds per second",
        lines: lines(points),
    }
}

/// The name of the line to which a row belongs; what all rows share is left out.
fn series(rows: &[Row], row: &Row, other_size: usize, unit: &str) -> String {
    let mut name = row.workload.to_owned();
    if other_size > 1 {
        name.push_str(&format!(", {other_size} {unit}"));
    }
    if rows.iter().any(|other| other.url != row.url) {
        name.push_str(&format!(", {}", row.url));
    }
    name
}

/// Lines of two points or more.
fn lines(points: impl Iterator<Item = (String, (f64, f64))>) -> Vec<Line> {
    let mut lines: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for (name, point) in points {
        lines.entry(name).or_default().push(point);
    }
    for points in lines.values_mut() {
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
        points.dedup_by_key(|point| point.0);
    }
    lines.retain(|_, points| points.len() > 1);
    lines.into_iter().collect()
}

/// The range of one coordinate, with a margin for a logarithmic axis.
fn range(lines: &[Line], coordinate: impl Fn(&(f64, f64)) -> f64) -> Range<f64> {
    let values = lines.iter().flat_map(|(_, points)| points).map(coordinate);
    let (low, high) = values.fold((f64::INFINITY, 0.0_f64), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    low / MARGIN..high * MARGIN
}

fn chart(svg: &mut String, plot: &Plot) -> Result<(), String> {
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    area.fill(&WHITE).map_err(|error| failed(&error))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(plot.title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(
            range(&plot.lines, |point| point.0).log_scale(),
            range(&plot.lines, |point| point.1).log_scale(),
        )
        .map_err(|error| failed(&error))?;
    chart
        .configure_mesh()
        .x_desc(plot.x)
        .y_desc(plot.y)
        .x_label_formatter(&|value| label(*value))
        .y_label_formatter(&|value| label(*value))
        .draw()
        .map_err(|error| failed(&error))?;
    for (nth, (name, points)) in plot.lines.iter().enumerate() {
        let color = Palette99::pick(nth).to_rgba();
        chart
            .draw_series(
                LineSeries::new(points.iter().copied(), color.stroke_width(2)).point_size(3),
            )
            .map_err(|error| failed(&error))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()
        .map_err(|error| failed(&error))?;
    area.present().map_err(|error| failed(&error))
}

/// Whole numbers as they are, parts with as many digits as tell them apart.
fn label(value: f64) -> String {
    if value >= 10.0 {
        format!("{value:.0}")
    } else {
        let text = format!("{value:.2}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn row(workload: &'static str, tokens: Option<usize>, clients: usize, url: &str) -> Row {
        Row {
            workload,
            tokens,
            clients,
            in_flight: 1,
            url: url.to_owned(),
            rounds: 10,
            rounds_per_second: 100.0 * clients as f64,
            p50_us: tokens.unwrap_or(7) as f64,
            p99_us: 1.0,
            p999_us: 1.0,
            gib_per_second: None,
            refused: 0,
            errors: 0,
            first_error: None,
            p50_speedup: None,
            rate_speedup: None,
        }
    }

    #[test]
    fn a_plot_is_drawn_for_each_size_that_varies_with_a_line_for_each_of_the_rest() {
        let directory = tempfile::tempdir().unwrap();
        let rows = [
            row("lookup-hit", Some(1024), 1, "tcp://a"),
            row("lookup-hit", Some(1024), 1, "tcp://b"),
            row("lookup-hit", Some(8192), 1, "tcp://a"),
            row("lookup-hit", Some(8192), 1, "tcp://b"),
            row("noop", None, 1, "tcp://a"),
        ];
        let written = draw(directory.path(), &rows).unwrap();
        assert_eq!(written, ["latency-over-tokens.svg"]);
        let svg = std::fs::read_to_string(directory.path().join(written[0])).unwrap();
        for text in ["lookup-hit, tcp://a", "lookup-hit, tcp://b", "tokens"] {
            assert!(svg.contains(text), "{text} is missing");
        }
        assert!(!svg.contains("noop"), "one point is no line");
        assert_eq!(
            svg.matches("<polyline").count() % 2,
            0,
            "two lines, two legends"
        );

        let rows = [row("noop", None, 1, "u"), row("noop", None, 16, "u")];
        let written = draw(directory.path(), &rows).unwrap();
        assert_eq!(written, ["throughput-over-clients.svg"]);
    }

    #[test]
    fn axes_cover_every_point() {
        let lines = vec![("a".to_owned(), vec![(1.0, 5.0), (100.0, 0.5)])];
        let (x, y) = (range(&lines, |it| it.0), range(&lines, |it| it.1));
        assert!(x.contains(&1.0) && x.contains(&100.0) && !x.contains(&200.0));
        assert!(y.contains(&0.5) && y.contains(&5.0));
    }
}

import SwiftUI

/// What the model has written, and what it can be asked for.
struct PageView: View {
    let session: ReadingSession

    @State private var prompt = ""
    @State private var name = ""
    @State private var isNaming = false

    var body: some View {
        VStack(alignment: .leading, spacing: 12) {
            ScrollView {
                Text(session.written)
                    .font(.body)
                    .textSelection(.enabled)
                    .frame(maxWidth: .infinity, alignment: .leading)
                    .accessibilityLabel("What the model has written")
                    .accessibilityValue(session.written)
            }
            StatusView(session: session)
            if let problem = session.problem { ProblemText(problem: problem) }
            ForEach(session.warnings, id: \.self) { Text($0).font(.footnote).foregroundStyle(.secondary) }
            HStack {
                TextField("Add a line before it goes on", text: $prompt, axis: .vertical)
                    .textFieldStyle(.roundedBorder)
                    .lineLimit(1...4)
                ActionButton(session: session) {
                    session.goOn(after: prompt)
                    prompt = ""
                }
            }
        }
        .padding()
        .navigationTitle(session.title)
        .toolbar {
            Button("Remember", systemImage: "bookmark") {
                name = session.title
                isNaming = true
            }
            .disabled(!session.canGoOn)
        }
        .alert("Remember this state", isPresented: $isNaming) {
            TextField("Name", text: $name)
            Button("Remember") { session.remember(as: name) }
            Button("Cancel", role: .cancel) {}
        }
    }
}

/// Goes on, or stops what runs.
private struct ActionButton: View {
    let session: ReadingSession
    let goOn: () -> Void

    var body: some View {
        if session.isResting {
            Button("Go on", systemImage: "play.fill", action: goOn)
                .disabled(!session.canGoOn)
                .accessibilityHint("The model writes on")
        } else {
            Button("Stop", systemImage: "stop.fill", action: session.stop)
                .accessibilityHint("Nothing that was read is lost")
        }
    }
}

private struct StatusView: View {
    let session: ReadingSession

    var body: some View {
        switch session.activity {
        case .reading(let done, let total):
            ProgressView(value: Double(done), total: Double(max(total, 1))) {
                Text("Reading: \(done) of \(total) tokens")
            }
        case .writing:
            ProgressView("Writing")
        case .working:
            ProgressView("Saving or loading")
        case .resting:
            HStack {
                Text("\(session.tokens) tokens read")
                if session.unreadTokens > 0 {
                    Button("Read the other \(session.unreadTokens)", action: session.readOn)
                }
                if session.tokensPerSecond > 0 {
                    Text("\(session.tokensPerSecond, format: .number.precision(.fractionLength(0))) tokens a second")
                }
            }
            .font(.footnote)
            .foregroundStyle(.secondary)
        }
    }
}

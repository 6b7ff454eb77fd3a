import SwiftUI

/// What went wrong, in the person's language where the text is the app's own.
struct ProblemText: View {
    let problem: Problem

    var body: some View {
        Label {
            text
        } icon: {
            Image(systemName: "exclamationmark.triangle").accessibilityHidden(true)
        }
        .foregroundStyle(.red)
        .accessibilityElement(children: .combine)
    }

    private var text: Text {
        switch problem {
        case .reader(.notText(let name)): Text("\(name) is not text in UTF-8.")
        case .reader(.emptyText(let name)): Text("There is no text in \(name).")
        case .reader(.unreadableFile(let name)): Text("\(name) cannot be read.")
        case .reader(.noModel): Text("There is no model in the app; README.md says how to put one in.")
        case .other(let message): Text(verbatim: message)
        }
    }
}

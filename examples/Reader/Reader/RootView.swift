import SwiftUI

struct RootView: View {
    let app: AppModel

    var body: some View {
        Group {
            switch app.loading {
            case .busy:
                ProgressView("Loading the model")
            case .failed(let problem):
                ContentUnavailableView {
                    Label("The model cannot be loaded", systemImage: "exclamationmark.triangle")
                } description: {
                    ProblemText(problem: problem)
                }
            case .ready(let session, _):
                LibraryView(books: app.books, states: app.states, session: session)
            }
        }
        .task { await app.load() }
    }
}
